// The page: wires conversations, settings and view together, and runs one answer at a time.

import * as api from './api.js';
import * as talk from './conversation.js';
import { settings as makeSettings } from './settings.js';
import * as storage from './storage.js';
import { element } from './text.js';
import { View } from './view.js';

const EXAMPLES = ['In the beginning God', 'The file contains', 'El sistema operativo', 'Die Datei enthält', 'Le paquet Debian'];
const THEMES = [[null, 'as the system'], ['light', 'light'], ['dark', 'dark']];
/** Milliseconds between what a screen reader is told of an answer that is coming. */
const ANNOUNCE_EVERY = 4000;
const SAVE_EVERY = 1000;

const at = (id) => document.getElementById(id);
const page = Object.fromEntries(['list', 'settings', 'conversations', 'turns', 'empty', 'scroll', 'ask', 'question', 'send', 'stop',
  'status', 'model', 'editing'].map((id) => [id, at(id)]));

let conversation = talk.begin();
let model = null;
/** The answer under way: its turn and what ends it. */
let running = null;
/** The turn whose question is being edited. */
let edited = null;

const settings = makeSettings(page.settings, loadModel);
const view = new View(page.turns, { regenerate: answer, retry: answer, edit });

function mode() {
  return document.querySelector('input[name=mode]:checked').value;
}

function setMode(value) {
  document.querySelector(`input[name=mode][value=${value === 'completion' ? 'completion' : 'chat'}]`).checked = true;
  const completion = value === 'completion';
  page.question.placeholder = completion ? 'Begin a text, and it goes on…' : 'Ask something…';
  at('question-label').textContent = completion ? 'Text to complete' : 'Your message';
  storage.remember('mode', mode());
}

async function loadModel() {
  if (model && !settings.key()) return;
  try {
    [model] = await api.models(settings.key());
    const { experts } = model;
    page.model.replaceChildren(element('strong', { text: model.id }),
      ...(experts ? [element('span', { text: `${experts.layers} layers × ${experts.per_layer} experts, ${experts.per_token} per token` })] : []));
  } catch (error) {
    page.model.replaceChildren(element('span', { text: error.message }));
    if (error.status === 401) showKey();
  }
}

function showKey() {
  open('settings', true);
  settings.askForKey();
}

/** Opens or closes a side panel, and tells its button. */
function open(name, shown) {
  page[name].hidden = !shown;
  at(`toggle-${name}`).setAttribute('aria-expanded', String(shown));
  document.body.dataset[name] = shown ? 'open' : 'closed';
}

function show(chosen) {
  conversation = chosen;
  edited = null;
  page.editing.hidden = true;
  render();
  list();
  if (conversation.turns.length > 0) setMode(conversation.turns.at(-1).mode);
  page.scroll.scrollTop = page.scroll.scrollHeight;
}

function render() {
  page.empty.hidden = conversation.turns.length > 0;
  view.conversation(conversation, model?.experts?.per_layer ?? 0);
}

function list() {
  const items = storage.conversations().map((kept) => {
    const current = kept.id === conversation.id;
    const choose = element('button', { type: 'button', class: 'choose', text: kept.title, title: kept.title, 'aria-current': current && 'true' });
    choose.addEventListener('click', () => {
      halt();
      show(kept);
      storage.remember('current', kept.id);
      if (narrow.matches) open('list', false);
      page.question.focus();
    });
    const remove = element('button', { type: 'button', class: 'icon small', text: '×', 'aria-label': `Delete ${kept.title}` });
    remove.addEventListener('click', () => {
      if (current) halt();
      storage.forget(kept.id);
      if (current) begin();
      else list();
    });
    return element('li', {}, choose, remove);
  });
  page.conversations.replaceChildren(...items);
}

function begin() {
  halt();
  storage.remember('current', null);
  show(talk.begin());
  page.question.focus();
}

function halt() {
  running?.abort.abort();
}

function edit(turn) {
  halt();
  edited = turn;
  setMode(turn.mode);
  page.editing.hidden = false;
  page.question.value = turn.question;
  grow();
  page.question.focus();
}

function endEdit() {
  edited = null;
  page.editing.hidden = true;
}

function send() {
  const question = page.question.value;
  if (!question.trim() || running) return;
  if (!valid()) return;
  if (edited) conversation.turns.splice(conversation.turns.indexOf(edited));
  endEdit();
  page.question.value = '';
  grow();
  answer(talk.ask(conversation, question, mode()));
}

/** The settings; when one is out of its range it is shown, and there are none. */
function valid() {
  const chosen = settings.read();
  if (!chosen) {
    open('settings', true);
    settings.complain();
  }
  return chosen;
}

/** Has `turn` answered, anew if it was before. */
async function answer(turn) {
  if (running) return;
  const chosen = valid();
  if (!chosen) return;
  const own = conversation;
  turn.answer = talk.answer();
  const abort = new AbortController();
  running = { turn, abort };
  page.stop.hidden = false;
  page.send.hidden = true;
  storage.remember('current', own.id);
  storage.keep(own);
  render();
  list();
  stick(true);
  const announcer = announce();
  const began = performance.now();
  let saved = began;
  try {
    const body = talk.body(own, turn, chosen, model?.id);
    for await (const piece of api.complete(talk.PATHS[turn.mode], body, { key: settings.key(), signal: abort.signal })) {
      const now = performance.now();
      talk.take(turn.answer, piece, now - began);
      announcer.more(turn.answer.text);
      if (now - saved > SAVE_EVERY) {
        saved = now;
        storage.keep(own);
      }
      paint(turn);
    }
    turn.answer.state = 'done';
  } catch (error) {
    if (error.name === 'AbortError') {
      turn.answer.state = 'stopped';
    } else {
      const retryAt = error.retryAfter ? Date.now() + error.retryAfter * 1000 : null;
      turn.answer.state = 'failed';
      turn.answer.error = { message: error instanceof api.ApiError ? error.message : `This page failed: ${error.message}`, retryAt };
      if (error.status === 401) showKey();
    }
  }
  running = null;
  page.stop.hidden = true;
  page.send.hidden = false;
  own.updated = Date.now();
  if (storage.conversations().some((kept) => kept.id === own.id)) storage.keep(own);
  const following = isAtEnd();
  view.update(turn);
  stick(following);
  announcer.end(turn.answer);
}

let painting = false;

/** Shows what has come, at most once a frame. */
function paint(turn) {
  if (painting) return;
  painting = true;
  requestAnimationFrame(() => {
    painting = false;
    const following = isAtEnd();
    view.update(turn);
    stick(following);
  });
}

function isAtEnd() {
  return page.scroll.scrollHeight - page.scroll.scrollTop - page.scroll.clientHeight < 48;
}

function stick(following) {
  if (following) page.scroll.scrollTop = page.scroll.scrollHeight;
}

/** Tells screen readers of an answer in whole sentences and not too often. */
function announce() {
  let told = 0;
  let last = performance.now();
  page.status.textContent = 'Answering.';
  return {
    more(text) {
      const end = Math.max(...['. ', '! ', '? ', '\n'].map((mark) => text.lastIndexOf(mark))) + 1;
      if (end <= told || performance.now() - last < ANNOUNCE_EVERY) return;
      page.status.textContent = text.slice(told, end);
      told = end;
      last = performance.now();
    },
    end(answer) {
      const ends = { done: 'Answer complete.', stopped: 'Answer stopped.', failed: '' };
      page.status.textContent = `${answer.text.slice(told)} ${ends[answer.state]}`;
    },
  };
}

function grow() {
  page.question.style.height = 'auto';
  page.question.style.height = `${Math.min(page.question.scrollHeight, window.innerHeight / 3)}px`;
}

function theme(step) {
  let index = Math.max(THEMES.findIndex(([name]) => name === storage.theme()), 0);
  if (step) {
    index = (index + 1) % THEMES.length;
    const [name] = THEMES[index];
    storage.theme(name);
    if (name) document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
  }
  at('theme').setAttribute('aria-label', `Theme: ${THEMES[index][1]}`);
  at('theme').title = `Theme: ${THEMES[index][1]}`;
}

const narrow = window.matchMedia('(max-width: 800px)');

page.ask.addEventListener('submit', (event) => {
  event.preventDefault();
  send();
});
page.question.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
page.question.addEventListener('input', grow);
document.addEventListener('keydown', (event) => {
  if (event.key !== 'Escape') return;
  if (running) halt();
  else if (edited) endEdit();
  else if (narrow.matches) ['list', 'settings'].forEach((name) => open(name, false));
});
page.stop.addEventListener('click', halt);
at('new').addEventListener('click', begin);
at('cancel-edit').addEventListener('click', endEdit);
at('theme').addEventListener('click', () => theme(true));
for (const name of ['list', 'settings']) {
  at(`toggle-${name}`).addEventListener('click', () => {
    const shown = page[name].hidden;
    if (shown && narrow.matches) open(name === 'list' ? 'settings' : 'list', false);
    open(name, shown);
  });
}
document.querySelectorAll('input[name=mode]').forEach((input) => input.addEventListener('change', () => setMode(input.value)));
window.addEventListener('pagehide', () => running && storage.keep(conversation));
window.addEventListener('focus', () => model || loadModel());

at('examples').append(...EXAMPLES.map((text) => element('button', { type: 'button', text, onclick() {
  setMode('completion');
  page.question.value = text;
  grow();
  send();
} })));

theme(false);
setMode(storage.setting('mode', 'chat'));
open('list', !narrow.matches);
open('settings', false);
await loadModel();
show(storage.conversations().find((kept) => kept.id === storage.setting('current', null)) ?? talk.begin());
page.question.focus();
