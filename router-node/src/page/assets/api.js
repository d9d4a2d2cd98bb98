// The client of the router's API: what it serves, and completions as they are streamed. Knows nothing of the page.

/** What went wrong, in words, and whether and when asking again makes sense. */
export class ApiError extends Error {
  constructor(message, { status = 0, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const UNREACHABLE = 'The router cannot be reached. It may have been stopped, or the network is down.';

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function request(path, key, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, ...headers(key) } });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError(UNREACHABLE);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const said = body?.error?.message ?? `The router answered with status ${response.status}.`;
  const after = Number.parseFloat(response.headers.get('Retry-After'));
  const words = {
    401: `The router asks for an API key. ${said}`,
    403: `The API key does not allow this. ${said}`,
    429: `The router is busy: ${said}`,
    503: `The router cannot answer now: ${said}`,
  };
  const retryAfter = Number.isFinite(after) ? Math.min(Math.max(Math.ceil(after), 0), 3600) : null;
  return new ApiError(words[response.status] ?? said, { status: response.status, retryAfter });
}

/** The models that are served. */
export async function models(key) {
  const response = await request('/v1/models', key);
  return (await response.json()).data;
}

/** The data of each server-sent event in `body`, a stream of bytes. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith('data:')) {
          data.push(line.slice(line[5] === ' ' ? 6 : 5));
        } else if (line === '' && data.length > 0) {
          yield data.join('\n');
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Asks `path` for `body` and yields {text, experts, reason, usage} as they come. Errors: ApiError, and AbortError once
 * `signal` is aborted.
 */
export async function* complete(path, body, { key, signal }) {
  const response = await request(path, key, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify(body),
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === '[DONE]') return;
      const piece = JSON.parse(data);
      if (piece.error) throw new ApiError(`The answer broke off: ${piece.error.message}`, { status: 500 });
      const choice = piece.choices?.[0];
      yield {
        text: choice?.text ?? choice?.delta?.content ?? '',
        experts: choice?.experts ?? [],
        reason: choice?.finish_reason ?? null,
        usage: piece.usage ?? null,
      };
    }
  } catch (error) {
    if (error.name === 'AbortError' || error instanceof ApiError) throw error;
    throw new ApiError('The connection to the router was lost in the middle of the answer.');
  }
  throw new ApiError('The answer broke off before its end.');
}
