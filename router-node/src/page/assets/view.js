// What the conversation looks like: turns with their questions, answers and what can be done with them. Tells `actions` what was
// asked for; decides nothing itself.

import { rate } from './conversation.js';
import { experts } from './experts.js';
import { element, show } from './text.js';

const REASONS = { stop: 'ended by itself', length: 'token limit', tool_calls: 'asked for a tool', content_filter: 'filtered' };

/** The turns in `target`; `actions` has regenerate, edit, retry. */
export class View {
  #target;
  #actions;
  #shown = new Map();

  constructor(target, actions) {
    this.#target = target;
    this.#actions = actions;
  }

  /** Shows all turns of `conversation`; `count` is the number of experts in a layer. */
  conversation(conversation, count) {
    this.#shown.forEach((shown) => clearInterval(shown.countdown));
    this.#shown.clear();
    this.#target.replaceChildren();
    const last = conversation.turns.at(-1);
    for (const turn of conversation.turns) this.#add(turn, turn === last, count);
  }

  /** Shows what is new in `turn`. */
  update(turn) {
    const shown = this.#shown.get(turn.id);
    if (shown) this.#fill(shown, turn);
  }

  #add(turn, last, count) {
    const completion = turn.mode === 'completion';
    const question = element('div', { class: 'question' }, element('h2', { class: 'hidden', text: 'You asked' }),
      element('p', { text: turn.question }));
    const text = element('div', { class: 'text' });
    const notes = element('p', { class: 'notes' });
    const tools = element('div', { class: 'row', role: 'group', 'aria-label': 'What to do with this answer' });
    const problem = element('div', { class: 'problem', role: 'alert' });
    const below = element('div', { class: 'below' });
    const answer = element('div', { class: 'answer' }, element('h2', { class: 'hidden', text: 'Answer' }), text, problem,
      element('div', { class: 'foot' }, notes, tools), below);
    const article = element('article', { class: completion ? 'turn completion' : 'turn' }, ...(completion ? [] : [question]), answer);
    const shown = { article, answer, text, notes, tools, problem, below, last, count, countdown: 0, state: null };
    this.#shown.set(turn.id, shown);
    this.#target.append(article);
    this.#fill(shown, turn);
  }

  #fill(shown, turn) {
    const { answer } = turn;
    show(shown.text, answer.text, turn.mode === 'completion' ? turn.question : '');
    const streaming = answer.state === 'streaming';
    shown.answer.setAttribute('aria-busy', String(streaming));
    shown.answer.classList.toggle('streaming', streaming);
    shown.answer.classList.toggle('waiting', streaming && answer.text === '');
    shown.notes.textContent = notes(answer);
    if (shown.state === answer.state) return;
    shown.state = answer.state;
    this.#problem(shown, turn);
    shown.tools.replaceChildren(...(streaming ? [] : this.#tools(shown, turn)));
    if (streaming) shown.below.replaceChildren();
  }

  #tools(shown, turn) {
    const button = (name, does) => element('button', { type: 'button', class: 'quiet', text: name, onclick: does });
    const made = [];
    if (turn.answer.text) {
      const copy = button('Copy', async () => {
        copy.textContent = (await copied(turn.answer.text)) ? 'Copied' : 'Not copied';
        setTimeout(() => { copy.textContent = 'Copy'; }, 1500);
      });
      made.push(copy);
    }
    if (shown.last) {
      if (turn.answer.state !== 'failed') made.push(button('Regenerate', () => this.#actions.regenerate(turn)));
      made.push(button('Edit', () => this.#actions.edit(turn)));
    }
    if (turn.answer.experts.length > 0) {
      const toggle = button('Experts', () => {
        const open = shown.below.childElementCount === 0;
        shown.below.replaceChildren(...(open ? [experts(turn.answer.experts, shown.count)] : []));
        toggle.setAttribute('aria-expanded', String(open));
        if (open) shown.below.scrollIntoView({ block: 'nearest' });
      });
      toggle.setAttribute('aria-expanded', 'false');
      made.push(toggle);
    }
    return made;
  }

  #problem(shown, turn) {
    clearInterval(shown.countdown);
    const { error } = turn.answer;
    if (turn.answer.state !== 'failed' || !error) {
      shown.problem.replaceChildren();
      return;
    }
    const children = [element('p', { text: error.message })];
    if (shown.last) {
      const retry = element('button', { type: 'button', class: 'retry', text: 'Retry', onclick: () => this.#actions.retry(turn) });
      const until = error.retryAt ?? 0;
      const tick = () => {
        const left = Math.ceil((until - Date.now()) / 1000);
        retry.disabled = left > 0;
        retry.textContent = left > 0 ? `Retry in ${left} s` : 'Retry';
        if (left <= 0) clearInterval(shown.countdown);
      };
      tick();
      if (retry.disabled) shown.countdown = setInterval(tick, 250);
      children.push(retry);
    }
    shown.problem.replaceChildren(...children);
  }
}

/** Figures of an answer: tokens, speed, time to the first token, why it ended. */
function notes(answer) {
  if (answer.state === 'streaming' && answer.firstMs === null) return 'waiting for the first token…';
  const speed = rate(answer);
  const said = [
    answer.tokens > 0 && `${answer.tokens} ${answer.tokens === 1 ? 'token' : 'tokens'}`,
    speed && `${speed.toFixed(1)} tokens/s`,
    answer.firstMs !== null && `first after ${Math.round(answer.firstMs)} ms`,
    answer.state === 'stopped' ? 'stopped' : answer.reason && (REASONS[answer.reason] ?? answer.reason),
  ];
  return said.filter(Boolean).join(' · ');
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages over plain HTTP from another machine have no clipboard of this kind.
    const area = element('textarea', { class: 'hidden', 'aria-hidden': 'true' });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    return done;
  }
}
