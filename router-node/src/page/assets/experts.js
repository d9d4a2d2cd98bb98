// The expert view of an answer: which experts each token went through, layer by layer, and how often each was used in all.
// Real tables throughout, so that what shades show is also there to be read.

import { element } from './text.js';

/** A view of `tokens`, each {text, layers: [{ids, weights}]}; `count` is the number of experts in a layer. */
export function experts(tokens, count) {
  const layers = tokens[0].layers.length;
  const width = Math.max(count, 1 + Math.max(...tokens.flatMap((token) => token.layers.flatMap((layer) => layer.ids))));
  const detail = element('div', { class: 'detail' });
  const chips = tokens.map((token, index) => chip(token, index));
  const list = element('div', { class: 'chips', role: 'listbox', 'aria-label': 'Tokens of the answer', 'aria-orientation': 'horizontal' }, ...chips);
  let chosen = -1;

  const choose = (index, focus) => {
    const next = Math.min(Math.max(index, 0), tokens.length - 1);
    if (chosen >= 0) {
      chips[chosen].setAttribute('aria-selected', 'false');
      chips[chosen].tabIndex = -1;
    }
    chosen = next;
    chips[next].setAttribute('aria-selected', 'true');
    chips[next].tabIndex = 0;
    if (focus) chips[next].focus();
    detail.replaceChildren(...ofToken(tokens[next], next, width));
  };
  list.addEventListener('click', (event) => {
    const index = chips.indexOf(event.target.closest('.chip'));
    if (index >= 0) choose(index, true);
  });
  list.addEventListener('keydown', (event) => {
    const steps = { ArrowLeft: chosen - 1, ArrowRight: chosen + 1, ArrowUp: chosen - 1, ArrowDown: chosen + 1, Home: 0, End: tokens.length - 1 };
    if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    choose(steps[event.key], true);
  });
  choose(0, false);

  const perToken = tokens[0].layers[0].ids.length;
  const used = new Set(tokens.flatMap((token) => token.layers.flatMap((layer, at) => layer.ids.map((id) => `${at}.${id}`))));
  const summary = `${tokens.length} tokens, ${perToken} of ${width} experts in each of ${layers} layers; `
    + `${used.size} of ${layers * width} experts took part.`;
  return element('section', { class: 'experts', 'aria-label': 'Experts of this answer' },
    element('p', { class: 'summary', text: summary }), list,
    element('div', { class: 'panes' },
      element('div', { class: 'pane' }, detail),
      element('div', { class: 'pane' }, ...ofAnswer(tokens, layers, width))));
}

/** What a token looks like: white space is made visible. */
function visible(text) {
  return text.replaceAll('\n', '⏎').replaceAll('\t', '⇥').replace(/^ +| +$/g, (spaces) => '·'.repeat(spaces.length)) || '∅';
}

function chip(token, index) {
  return element('span', {
    class: 'chip', role: 'option', tabindex: '-1', 'aria-selected': 'false',
    'aria-label': `Token ${index + 1}: ${token.text.trim() || 'white space'}`, text: visible(token.text),
  });
}

/** The gate's choice for one token, as a grid and as a list. */
function ofToken(token, index, width) {
  const weights = token.layers.map(({ ids, weights }) => new Map(ids.map((id, rank) => [id, weights[rank]])));
  const cell = (layer, expert) => {
    const weight = weights[layer].get(expert);
    return weight === undefined ? null : { share: weight, text: weight.toFixed(2), title: `layer ${layer}, expert ${expert}: weight ${weight}` };
  };
  const rows = token.layers.map(({ ids, weights }, layer) => element('tr', {}, element('th', { scope: 'row', text: String(layer) }),
    element('td', { text: ids.map((id, rank) => `expert ${id} (${weights[rank].toFixed(3)})`).join(', ') })));
  const head = element('thead', {}, element('tr', {}, element('th', { scope: 'col', text: 'Layer' }), element('th', { scope: 'col', text: 'Experts and weights, strongest first' })));
  return [
    element('h3', {}, `Token ${index + 1} `, element('code', { text: visible(token.text) })),
    element('p', { class: 'hint', text: 'Weight of each chosen expert, by layer.' }),
    grid(`Experts of token ${index + 1}`, token.layers.length, width, cell),
    element('details', {}, element('summary', { text: 'As text' }), element('table', { class: 'plain' }, head, element('tbody', {}, ...rows))),
  ];
}

/** How often each expert was used. */
function ofAnswer(tokens, layers, width) {
  const counts = Array.from({ length: layers }, () => new Array(width).fill(0));
  for (const token of tokens) {
    token.layers.forEach(({ ids }, layer) => ids.forEach((id) => { counts[layer][id] += 1; }));
  }
  const most = Math.max(...counts.flat());
  const cell = (layer, expert) => {
    const times = counts[layer][expert];
    return times === 0 ? null : { share: times / most, text: String(times), title: `layer ${layer}, expert ${expert}: ${times} of ${tokens.length} tokens` };
  };
  return [
    element('h3', { text: 'Whole answer' }),
    element('p', { class: 'hint', text: 'Tokens that each expert worked on, by layer.' }),
    grid('Use of experts in the whole answer', layers, width, cell),
  ];
}

/** A table of layers by experts; `cell` gives {share, text, title}, or null for an expert that was not used. */
function grid(caption, layers, width, cell) {
  const heads = Array.from({ length: width }, (_, expert) => element('th', { scope: 'col', text: String(expert), title: `expert ${expert}` }));
  const rows = Array.from({ length: layers }, (_, layer) => {
    const cells = heads.map((_, expert) => {
      const shown = cell(layer, expert);
      if (!shown) return element('td', {});
      const made = element('td', { class: 'used', title: shown.title, text: shown.text });
      made.style.setProperty('--share', shown.share.toFixed(3));
      return made;
    });
    return element('tr', {}, element('th', { scope: 'row', text: `L${layer}`, title: `layer ${layer}` }), ...cells);
  });
  const corner = element('td', { class: 'corner' });
  const table = element('table', { class: 'grid' }, element('caption', { class: 'hidden', text: caption }),
    element('thead', {}, element('tr', {}, corner, ...heads)), element('tbody', {}, ...rows));
  return element('div', { class: 'scroller', tabindex: '0', role: 'region', 'aria-label': caption }, table);
}
