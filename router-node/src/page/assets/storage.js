// What the browser keeps: conversations and settings in its local storage, the API key only as long as the tab. Bounded: of what
// does not fit, expert data goes first, then the oldest conversations.

const CONVERSATIONS = 'sirocco.conversations';
const MOST_CONVERSATIONS = 50;
const MOST_CHARACTERS = 2_000_000;

function read(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Whether it was kept: a full or forbidden storage is no reason to stop talking. */
function write(key, text) {
  try {
    localStorage.setItem(key, text);
    return true;
  } catch {
    return false;
  }
}

/** All conversations, the latest first. Answers that were under way when the page was left are marked as stopped. */
export function conversations() {
  const kept = read(CONVERSATIONS, []);
  if (!Array.isArray(kept)) return [];
  for (const turn of kept.flatMap((conversation) => conversation.turns)) {
    if (turn.answer.state === 'streaming') turn.answer.state = 'stopped';
  }
  return kept;
}

/** Keeps `conversation`, and those that other tabs have written meanwhile. */
export function keep(conversation) {
  const others = read(CONVERSATIONS, []).filter((other) => other.id !== conversation.id);
  const all = [structuredClone(conversation), ...others].sort((a, b) => b.updated - a.updated);
  write(CONVERSATIONS, fit(all.slice(0, MOST_CONVERSATIONS)));
}

/** Forgets the conversation called `id`. */
export function forget(id) {
  write(CONVERSATIONS, JSON.stringify(read(CONVERSATIONS, []).filter((conversation) => conversation.id !== id)));
}

function fit(all) {
  let text = JSON.stringify(all);
  const traced = all.flatMap((conversation) => conversation.turns.toReversed()).filter((turn) => turn.answer.experts.length > 0);
  while (text.length > MOST_CHARACTERS && (traced.length > 1 || all.length > 1)) {
    if (traced.length > 1) traced.pop().answer.experts = [];
    else all.pop();
    text = JSON.stringify(all);
  }
  return text;
}

/** What was chosen under `name`. */
export function setting(name, otherwise) {
  return read(`sirocco.${name}`, otherwise);
}

/** Remembers `value` under `name`. */
export function remember(name, value) {
  write(`sirocco.${name}`, JSON.stringify(value));
}

/** The theme as the page's first script reads it: light, dark, or none to follow the system. */
export function theme(chosen) {
  if (chosen === undefined) return localStorage.getItem('sirocco.theme');
  if (chosen === null) localStorage.removeItem('sirocco.theme');
  else write('sirocco.theme', chosen);
  return chosen;
}

/** The API key of this tab; sets it when given. */
export function apiKey(given) {
  try {
    if (given !== undefined) sessionStorage.setItem('sirocco.key', given);
    return sessionStorage.getItem('sirocco.key') ?? '';
  } catch {
    return given ?? '';
  }
}
