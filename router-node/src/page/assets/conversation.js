// Conversations as data: their turns, and the requests they become. No page, no network, no storage.

/** Where each mode asks. */
export const PATHS = { chat: '/v1/chat/completions', completion: '/v1/completions' };

/** A name no other conversation or turn has. */
function name() {
  // randomUUID is absent on pages that come over plain HTTP from another machine.
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** An empty conversation. */
export function begin() {
  return { id: name(), title: 'New conversation', updated: Date.now(), turns: [] };
}

/** Adds a question to `conversation` and returns its turn, which has no answer yet. */
export function ask(conversation, question, mode) {
  const turn = { id: name(), mode, question, answer: answer() };
  conversation.turns.push(turn);
  if (conversation.turns.length === 1) conversation.title = title(question);
  conversation.updated = Date.now();
  return turn;
}

/** An answer of which nothing has come. States: streaming, done, stopped, failed. */
export function answer() {
  return { state: 'streaming', text: '', reason: null, error: null, tokens: 0, prompt: 0, firstMs: null, totalMs: null, experts: [] };
}

/** What a conversation that begins with `question` is called. */
export function title(question) {
  const line = question.trim().replace(/\s+/g, ' ');
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

/** The body of the request for `turn`, the last one of `conversation` that counts. */
export function body(conversation, turn, settings, model) {
  const fields = { model, stream: true, stream_options: { include_usage: true }, ...settings.sampling };
  if (settings.experts) fields.return_experts = true;
  if (turn.mode === 'completion') return { ...fields, prompt: turn.question };
  const messages = settings.system ? [{ role: 'system', content: settings.system }] : [];
  for (const past of conversation.turns) {
    if (past === turn) break;
    if (past.mode !== 'chat' || past.answer.state === 'failed') continue;
    messages.push({ role: 'user', content: past.question }, { role: 'assistant', content: past.answer.text });
  }
  messages.push({ role: 'user', content: turn.question });
  return { ...fields, messages };
}

/** Takes a piece of a stream into `answer`; `elapsed` is in milliseconds since it was asked for. */
export function take(answer, piece, elapsed) {
  if (answer.firstMs === null && (piece.text || piece.experts.length > 0)) answer.firstMs = elapsed;
  answer.text += piece.text;
  answer.totalMs = elapsed;
  for (const token of piece.experts) {
    const layers = token.layers.map(({ ids, weights }) => ({ ids, weights: weights.map((w) => Math.round(w * 1e4) / 1e4) }));
    answer.experts.push({ text: token.text, layers });
  }
  if (piece.reason) answer.reason = piece.reason;
  if (piece.usage) {
    answer.tokens = piece.usage.completion_tokens;
    answer.prompt = piece.usage.prompt_tokens;
  } else if (piece.text || piece.experts.length > 0) {
    // A close guess until the usage comes: a piece is a token, unless its text is held back.
    answer.tokens = Math.max(answer.tokens + 1, answer.experts.length);
  }
}

/** Tokens a second after the first one; null when there is nothing to measure. */
export function rate(answer) {
  const seconds = (answer.totalMs - answer.firstMs) / 1000;
  return answer.firstMs !== null && answer.tokens > 1 && seconds > 0 ? (answer.tokens - 1) / seconds : null;
}
