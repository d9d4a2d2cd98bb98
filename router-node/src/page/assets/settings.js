// The settings beside the conversation: how answers are drawn, the system prompt, the API key. Remembers what was chosen.

import { element } from './text.js';
import * as storage from './storage.js';

/** Fields of requests, each with its range and what it does. An empty one is left out, and the router's own default holds. */
const SAMPLING = [
  { name: 'temperature', label: 'Temperature', min: 0, max: 2, step: 0.05, start: 0.7, hint: '0 always takes the likeliest token; higher is more varied.' },
  { name: 'top_p', label: 'Top p', min: 0.01, max: 1, step: 0.01, hint: 'Draw from the likeliest tokens that together reach this probability.' },
  { name: 'top_k', label: 'Top k', min: 0, step: 1, hint: 'Draw from this many of the likeliest tokens; 0 is all.' },
  { name: 'min_p', label: 'Min p', min: 0, max: 1, step: 0.01, hint: 'Leave out tokens less likely than this share of the likeliest one.' },
  { name: 'max_tokens', label: 'Max tokens', min: 1, step: 1, start: 256, hint: 'The answer ends after this many tokens.' },
  { name: 'seed', label: 'Seed', step: 1, hint: 'The same seed gives the same answer; empty draws a new one.' },
  { name: 'presence_penalty', label: 'Presence penalty', min: -2, max: 2, step: 0.1, hint: 'Above 0, tokens that were said become less likely.' },
  { name: 'frequency_penalty', label: 'Frequency penalty', min: -2, max: 2, step: 0.1, hint: 'The same, for each time they were said.' },
  { name: 'repetition_penalty', label: 'Repetition penalty', min: 0.1, max: 10, step: 0.05, hint: 'Above 1, tokens of the question and the answer become less likely.' },
];

/** Fills `panel`; `changed` is told of every change. Returns what reads the settings and shows the API key. */
export function settings(panel, changed) {
  const kept = storage.setting('settings', {});
  const inputs = new Map();
  const experts = element('input', { type: 'checkbox', id: 'record-experts', 'aria-describedby': 'hint-experts' });
  experts.checked = kept.experts ?? true;
  const system = element('textarea', { id: 'system', rows: '3', 'aria-describedby': 'hint-system' });
  system.value = kept.system ?? '';
  const stop = element('textarea', { id: 'stop-strings', rows: '2', 'aria-describedby': 'hint-stop' });
  stop.value = kept.stop ?? '';
  const key = element('input', { id: 'api-key', type: 'password', autocomplete: 'off', 'aria-describedby': 'hint-key' });
  key.value = storage.apiKey();

  const save = () => {
    const given = Object.fromEntries([...inputs].map(([name, input]) => [name, input.value]));
    storage.remember('settings', { given, system: system.value, stop: stop.value, experts: experts.checked });
    changed();
  };
  const sampling = SAMPLING.map(({ name, label, hint, start, ...range }) => {
    const id = name.replaceAll('_', '-');
    const input = element('input', { id, type: 'number', placeholder: 'default', 'aria-describedby': `hint-${id}`, ...range });
    input.value = kept.given?.[name] ?? start ?? '';
    inputs.set(name, input);
    return field(id, label, hint, input);
  });
  const reset = element('button', { type: 'button', class: 'link', text: 'Reset to defaults' });
  reset.addEventListener('click', () => {
    for (const { name, start } of SAMPLING) inputs.get(name).value = start ?? '';
    stop.value = '';
    save();
  });
  key.addEventListener('input', () => storage.apiKey(key.value.trim()));
  key.addEventListener('change', changed);
  panel.addEventListener('input', (event) => event.target !== key && save());
  panel.replaceChildren(element('h2', { text: 'Settings' }), element('form', { onsubmit: (event) => event.preventDefault() },
    element('fieldset', {}, element('legend', { text: 'Instructions' }),
      field('system', 'System prompt', 'Said before every chat; completions go without.', system, true)),
    element('fieldset', {}, element('legend', { text: 'Sampling' }), ...sampling,
      field('stop-strings', 'Stop', 'The answer ends before any of these, one a line.', stop, true, 'stop'), reset),
    element('fieldset', {}, element('legend', { text: 'Router' }),
      element('div', { class: 'field check' }, experts, element('label', { for: 'record-experts', text: 'Record experts' }),
        element('p', { class: 'hint', id: 'hint-experts', text: 'Has the router say which experts ran. It then computes every question anew.' })),
      field('api-key', 'API key', 'Only if the router asks for one. Forgotten with this tab.', key, true, 'key'))));

  return {
    /** What a request takes; null when a number is out of its range, which is then shown. */
    read() {
      const fields = {};
      for (const [name, input] of inputs) {
        if (!input.checkValidity()) return null;
        if (input.value !== '') fields[name] = Number(input.value);
      }
      const stops = stop.value.split('\n').filter((line) => line !== '');
      if (stops.length > 0) fields.stop = stops;
      return { sampling: fields, system: system.value.trim(), experts: experts.checked };
    },
    /** Shows what is wrong with the first number that is out of its range. */
    complain() {
      [...inputs.values()].find((input) => !input.reportValidity());
    },
    key: () => storage.apiKey(),
    /** Puts the cursor into the field of the API key. */
    askForKey() {
      key.focus();
    },
  };
}

function field(id, label, hint, input, tall = false, hintName = id) {
  const hintElement = element('p', { class: 'hint', id: `hint-${hintName}`, text: hint });
  return element('div', { class: tall ? 'field tall' : 'field' }, element('label', { for: id, text: label }), input, hintElement);
}
