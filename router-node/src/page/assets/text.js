// Text as paragraphs and code blocks. All of it goes in as text: nothing a model says is ever read as HTML.

/** Makes an element with properties and children. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === 'text') made.textContent = value;
    else if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? '' : value);
  }
  made.append(...children);
  return made;
}

/** Parts of `text`: {code: false, text} or {code: true, language, text}. An open fence lasts to the end. */
export function parts(text) {
  const found = [];
  let lines = [];
  let fence = null;
  const close = () => {
    const body = lines.join('\n');
    if (fence || body.trim()) found.push({ code: Boolean(fence), language: fence?.language ?? '', text: body });
    lines = [];
  };
  for (const line of text.split('\n')) {
    const mark = line.match(/^\s*```\s*([\w+#.-]*)\s*$/);
    if (mark && (!fence || !mark[1])) {
      close();
      fence = fence ? null : { language: mark[1] };
    } else {
      lines.push(line);
    }
  }
  close();
  return found;
}

/** Shows `text` in `target`; `lead` is shown before it, in the same flow. */
export function show(target, text, lead = '') {
  if (lead) {
    const flow = element('p', { class: 'flow' }, element('span', { class: 'lead', text: lead }), text);
    target.replaceChildren(flow);
    return;
  }
  const blocks = parts(text.trimStart()).flatMap((part) => {
    if (part.code) {
      const caption = part.language ? [element('span', { class: 'language', text: part.language })] : [];
      return [element('div', { class: 'code' }, ...caption, element('pre', { tabindex: '0' }, element('code', { text: part.text })))];
    }
    const paragraphs = part.text.split(/\n{2,}/).filter((paragraph) => paragraph.trim());
    return paragraphs.map((paragraph) => element('p', { text: paragraph.replace(/^\n+|\n+$/g, '') }));
  });
  target.replaceChildren(...blocks);
}
