(() => {
  'use strict';
  const root = document.documentElement;
  const system = matchMedia('(prefers-color-scheme: dark)');
  const button = document.getElementById('theme');
  const isDark = () => (root.dataset.theme ?? (system.matches ? 'dark' : 'light')) === 'dark';

  function name() {
    button.textContent = isDark() ? 'Light' : 'Dark';
    button.setAttribute('aria-label', `Switch to the ${isDark() ? 'light' : 'dark'} theme`);
  }

  function changed() {
    name();
    document.dispatchEvent(new CustomEvent('theme'));
  }

  button.addEventListener('click', () => {
    root.dataset.theme = isDark() ? 'light' : 'dark';
    try {
      localStorage.setItem('segbench-theme', root.dataset.theme);
    } catch {
      // storage is not allowed: the choice holds for this page
    }
    changed();
  });
  system.addEventListener('change', changed);
  name();

  // for pages on which the clipboard interface is not allowed
  function copyOldWay(text) {
    const area = document.createElement('textarea');
    area.value = text;
    area.className = 'hidden-text';
    document.body.append(area);
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    return done;
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      return copyOldWay(text);
    }
  }

  document.addEventListener('click', async (event) => {
    const pressed = event.target instanceof Element ? event.target.closest('[data-copy]') : null;
    if (!pressed) return;
    const done = await copy(pressed.dataset.copy);
    if (document.activeElement === document.body) pressed.focus();
    document.getElementById('said').textContent = done ? `Copied ${pressed.dataset.copy}` : 'The browser does not let this page copy.';
    if (!done || pressed.dataset.busy) return;
    const label = pressed.textContent;
    pressed.dataset.busy = 'yes';
    pressed.textContent = 'Copied';
    setTimeout(() => {
      pressed.textContent = label;
      delete pressed.dataset.busy;
    }, 1200);
  });
})();
