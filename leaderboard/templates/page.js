// The index: choose, filter, sort, tick, draw, download. Data go into the page as text, never as markup.
(() => {
  'use strict';
  const DATA = JSON.parse(document.getElementById('data').textContent);
  const METRICS = ['aacc', 'miou'];
  const NAMES = { aacc: 'aAcc', miou: 'mIoU' };
  const TIERS = ['reproduced', 'checked', 'reported'];
  const FILTERS = { architecture: 'Architecture', backbone: 'Backbone', tier: 'Tier', extra_data: 'Extra data', size: 'Size' };
  const SIZES = { small: ['under 10M', 0, 1e7], medium: ['10M to 50M', 1e7, 5e7], large: ['50M to 100M', 5e7, 1e8], huge: ['100M and more', 1e8, Infinity] };
  const NONE = '(none)'; // a filter for rows without a value
  const FIRST = 100; // rows that are drawn before the reader asks for all
  const UNTICKED = 5; // the best rows are in the plots while none is ticked
  const collator = new Intl.Collator('en', { numeric: true });
  const byId = (id) => document.getElementById(id);
  const percent = (value) => (value == null ? '–' : (100 * value).toFixed(1));
  const tables = DATA.tables.map(prepareTable);
  if (!tables.length) return;
  let state = fresh();
  let shown = []; // rows that pass the filters, in order

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  // ---- state and its form in the URL

  function fresh(table = tables[0]) {
    return { table, eps: DATA.defaults.eps, metric: DATA.defaults.metric, q: '', filters: {}, sort: 'rank', down: false, ticked: new Set(), columns: null, all: false };
  }

  function usual(table) {
    return new Set(table.columns.filter((column) => column.shown).map((column) => column.key));
  }

  function toHash() {
    const parts = [];
    const put = (name, value) => parts.push(`${name}=${encodeURIComponent(value).replaceAll('%2F', '/').replaceAll('%2C', ',')}`);
    const list = (values) => [...values].map(encodeURIComponent).join(',');
    if (state.table !== tables[0]) put('data', state.table.key);
    if (state.eps !== DATA.defaults.eps) put('eps', state.eps);
    if (state.metric !== DATA.defaults.metric) put('metric', state.metric);
    for (const name of Object.keys(FILTERS)) if (state.filters[name]) put(name, state.filters[name]);
    if (state.q) put('q', state.q);
    if (state.sort !== 'rank' || state.down) put('sort', (state.down ? '-' : '') + state.sort);
    if (state.ticked.size) put('rows', list(state.ticked));
    if (state.columns) put('columns', list(state.columns));
    return parts.length ? `#${parts.join('&')}` : '';
  }

  function fromHash(hash) {
    const values = new URLSearchParams(hash.slice(1));
    const list = (name) => (values.get(name) ?? '').split(',').map(decoded).filter(Boolean);
    const next = fresh(tables.find((table) => table.key === values.get('data')) ?? tables[0]);
    const { table } = next;
    if (table.views.some((view) => view.key === values.get('eps'))) next.eps = values.get('eps');
    if (METRICS.includes(values.get('metric'))) next.metric = values.get('metric');
    for (const name of Object.keys(FILTERS)) {
      if (options(table, name).some(([value]) => value === values.get(name))) next.filters[name] = values.get(name);
    }
    next.q = (values.get('q') ?? '').slice(0, 200);
    const sort = values.get('sort') ?? '';
    const key = sort.replace(/^-/, '');
    if (table.columns.some((column) => column.key === key && sortable(column))) [next.sort, next.down] = [key, sort !== key];
    next.ticked = new Set(list('rows').filter((id) => table.byName.has(id)).slice(0, DATA.series));
    const keys = new Set(table.columns.map((column) => column.key));
    if (values.has('columns')) next.columns = new Set(list('columns').filter((column) => keys.has(column)));
    return next;
  }

  function decoded(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return '';
    }
  }

  function change(changes, { replace = false } = {}) {
    // another order starts at its first rows again: ordering thousands of drawn rows takes seconds
    Object.assign(state, 'ticked' in changes || 'columns' in changes ? {} : { all: false }, changes);
    const hash = toHash();
    if (hash !== location.hash) history[replace ? 'replaceState' : 'pushState'](null, '', hash || location.pathname + location.search);
    draw();
  }

  // ---- tables: the rows that came with the page, in another order

  function prepareTable(data, number) {
    const section = byId(`board-${number}`);
    const body = section.querySelector('tbody');
    const found = [...body.rows];
    const rows = data.rows.map((row, place) => ({ ...row, place, line: found[place], dressed: false }));
    const place = Object.fromEntries(data.columns.map((column, index) => [column.key, index]));
    const table = { ...data, number, section, body, rows, place, element: section.querySelector('table'), drawn: null, shared: new Map() };
    table.byName = new Map(rows.map((row) => [row.id, row]));
    table.heads = [...section.querySelectorAll('thead th')];
    table.columns.forEach((column, index) => sortable(column) && addSorter(column, table.heads[index]));
    section.querySelector('.more button').addEventListener('click', () => {
      state.all = true;
      draw();
    });
    section.classList.add('ready');
    section.hidden = true;
    return table;
  }

  function sortable(column) {
    return column.kind !== 'links' || column.key === 'paper';
  }

  function addSorter(column, head) {
    const button = make('button', { type: 'button' }, ...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const same = state.sort === column.key;
      change({ sort: column.key, down: same ? !state.down : startsDown(column.key) });
    });
  }

  // the first press on a column shows the high scores, or the low costs
  function startsDown(key) {
    return key === 'score' || key === 'best' || key === 'flags' || key.includes('.');
  }

  // tick box and copy button of a row, made when it is first shown
  function dress(table, row) {
    row.dressed = true;
    const cells = row.line.cells;
    row.rank = make('span');
    row.tick = make('input', { type: 'checkbox', title: 'In the plots' });
    row.tick.setAttribute('aria-label', `${row.id} in the plots`);
    row.tick.addEventListener('change', () => tick(row));
    cells[table.place.rank].replaceChildren(row.tick, row.rank);
    if (!row.loadable) return;
    const copy = make('button', { type: 'button', className: 'copy', textContent: 'Copy' });
    copy.dataset.copy = `segbench.load_model(${JSON.stringify(row.id)})`;
    copy.title = copy.dataset.copy;
    copy.setAttribute('aria-label', `Copy ${copy.dataset.copy}`);
    cells[table.place.model].querySelector('.under').append(copy);
  }

  function tick(row) {
    const ticked = new Set(state.ticked);
    if (!row.tick.checked) ticked.delete(row.id);
    else if (ticked.size < DATA.series) ticked.add(row.id);
    else byId('said').textContent = `At most ${DATA.series} models are in the plots.`;
    change({ ticked });
  }

  function score(row, view = state.eps, metric = state.metric) {
    return row.scores[view]?.[METRICS.indexOf(metric)] ?? null;
  }

  // how many rows have a rank, for the sign of shared ones
  function sharing(table) {
    const key = `${state.eps} ${state.metric}`;
    if (!table.shared.has(key)) {
      const counts = new Map();
      for (const row of table.rows) {
        const rank = score(row)?.[4];
        if (rank != null) counts.set(rank, (counts.get(rank) ?? 0) + 1);
      }
      table.shared.set(key, counts);
    }
    return table.shared.get(key);
  }

  function fill(table, row, counts) {
    if (!row.dressed) dress(table, row);
    row.tick.checked = state.ticked.has(row.id);
    const key = `${state.eps} ${state.metric}`;
    if (row.filled === key) return;
    row.filled = key;
    const [value, low, high, best, rank] = score(row) ?? [null, null, null, null, null];
    row.rank.textContent = rank == null ? '–' : `${counts.get(rank) > 1 ? '=' : ''}${rank}`;
    const cells = row.line.cells;
    cells[table.place.score].replaceChildren(make('b', { textContent: percent(value) }));
    if (low != null) cells[table.place.score].append(' ', make('small', { textContent: `${percent(low)}–${percent(high)}` }));
    cells[table.place.best].textContent = percent(best);
    cells[table.place.best].className = best < value && percent(best) !== percent(value) ? 'n lower' : 'n';
  }

  function keyOf(row, column) {
    if (column === 'rank') return score(row)?.[4] == null ? null : score(row)[0];
    if (column === 'score') return score(row)?.[0] ?? null;
    if (column === 'best') return score(row)?.[3] ?? null;
    if (column === 'model') return row.id;
    if (column === 'tier') return TIERS.indexOf(row.tier);
    if (column === 'flags') return 1000 * row.warnings + row.notes;
    if (column.includes('.')) {
      const cut = column.lastIndexOf('.');
      return score(row, column.slice(0, cut), column.slice(cut + 1))?.[0] ?? null;
    }
    return row[column] === '' ? null : (row[column] ?? null);
  }

  function ordered(rows) {
    const down = state.sort === 'rank' ? !state.down : state.down;
    const sign = down ? -1 : 1;
    const byScore = state.sort === 'rank' || state.sort === 'score';
    const keyed = rows.map((row) => [keyOf(row, state.sort), row]);
    keyed.sort(([a, one], [b, other]) => {
      if (a === null || b === null) return (a === null) - (b === null) || one.place - other.place;
      const order = typeof a === 'number' ? a - b : collator.compare(a, b);
      return sign * order || (byScore ? (score(one)?.[4] ?? 0) - (score(other)?.[4] ?? 0) : 0) || one.place - other.place;
    });
    return keyed.map(([, row]) => row);
  }

  // ---- filters

  function valueOf(row, name) {
    if (name === 'size') return Object.keys(SIZES).find((key) => row.parameters != null && row.parameters >= SIZES[key][1] && row.parameters < SIZES[key][2]) ?? NONE;
    return row[name] || NONE;
  }

  function options(table, name) {
    const present = new Set(table.rows.map((row) => valueOf(row, name)));
    const order = name === 'size' ? Object.keys(SIZES) : name === 'tier' ? TIERS : [...present].filter((value) => value !== NONE).sort(collator.compare);
    const labelled = order.filter((value) => present.has(value)).map((value) => [value, name === 'size' ? SIZES[value][0] : value]);
    return present.has(NONE) ? [...labelled, [NONE, 'none or unknown']] : labelled;
  }

  function passing(table) {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = Object.entries(state.filters).filter(([, value]) => value);
    return table.rows.filter((row) => chosen.every(([name, value]) => valueOf(row, name) === value) && words.every((word) => row.words.includes(word)));
  }

  // ---- controls

  function choice(fieldset, name, items, current, chosen) {
    const legend = fieldset.querySelector('legend');
    const labels = items.map(({ key, label }) => {
      const input = make('input', { type: 'radio', name, value: key, checked: key === current });
      input.addEventListener('change', () => chosen(key));
      return make('label', {}, input, make('span', { textContent: label }));
    });
    fieldset.replaceChildren(legend, ...labels);
  }

  function select(element, items, current, chosen) {
    element.replaceChildren(...items.map(([value, label]) => make('option', { value, textContent: label, selected: value === current })));
    element.onchange = () => chosen(element.value);
  }

  function short(view) {
    return view.key === 'clean' ? 'clean' : view.key === 'mean' ? 'mean' : `${view.key}/255`;
  }

  let controlled = null; // the table that the controls were made for
  function drawControls() {
    const { table } = state;
    if (controlled !== table) {
      controlled = table;
      const several = new Set(tables.map((one) => one.protocol)).size > 1;
      select(byId('data-set'), tables.map((one) => [one.key, several ? `${one.dataset} (${one.protocol})` : one.dataset]), table.key, (key) => {
        change({ ...fresh(tables.find((one) => one.key === key)), metric: state.metric });
      });
      choice(byId('eps'), 'eps', table.views.map((view) => ({ key: view.key, label: short(view) })), state.eps, (eps) => change({ eps, sort: 'rank', down: false }));
      choice(byId('metric'), 'metric', [...METRICS].reverse().map((key) => ({ key, label: NAMES[key] })), state.metric, (metric) => change({ metric, sort: 'rank', down: false }));
      const fields = Object.entries(FILTERS).map(([name, label]) => {
        const element = make('select', { name });
        select(element, [['', 'any'], ...options(table, name)], '', (value) => change({ filters: { ...state.filters, [name]: value } }));
        return make('label', { className: 'field' }, label, element);
      });
      byId('filters').replaceChildren(byId('filters').firstElementChild, ...fields);
      const fieldset = byId('chooser').querySelector('fieldset');
      const boxes = table.columns.slice(2).map((column) => {
        const input = make('input', { type: 'checkbox', value: column.key });
        input.addEventListener('change', () => {
          const columns = new Set(state.columns ?? usual(table));
          columns[input.checked ? 'add' : 'delete'](column.key);
          change({ columns });
        });
        return make('label', {}, input, column.label);
      });
      fieldset.replaceChildren(fieldset.querySelector('legend'), ...boxes);
    }
    for (const name of ['eps', 'metric']) for (const input of byId(name).querySelectorAll('input')) input.checked = input.value === state[name];
    for (const element of byId('filters').querySelectorAll('select')) element.value = state.filters[element.name] ?? '';
    if (byId('search').value !== state.q) byId('search').value = state.q;
    const columns = state.columns ?? usual(table);
    for (const input of byId('chooser').querySelectorAll('input')) input.checked = columns.has(input.value);
  }

  // ---- drawing

  function putRows(table, part) {
    const counts = sharing(table);
    for (const row of part) fill(table, row, counts);
    const lines = part.map((row) => row.line);
    if (lines.length === table.drawn?.length && lines.every((line, index) => line === table.drawn[index])) return;
    const body = make('tbody', {}, ...lines); // a new body: taking thousands of rows out of the old one is slow
    table.body.replaceWith(body);
    Object.assign(table, { body, drawn: lines });
  }

  function draw() {
    const { table } = state;
    for (const one of tables) one.section.hidden = one !== table;
    drawControls();
    shown = ordered(passing(table));
    const part = state.all ? shown : shown.slice(0, FIRST);
    putRows(table, part);
    const columns = state.columns ?? usual(table);
    const hidden = table.columns.map((column, index) => (index < 2 || columns.has(column.key) ? '' : `h${index + 1}`));
    table.element.className = ['main', ...hidden].filter(Boolean).join(' ');
    table.columns.forEach((column, index) => {
      if (column.key !== state.sort) table.heads[index].removeAttribute('aria-sort');
      else table.heads[index].setAttribute('aria-sort', state.down ? 'descending' : 'ascending');
    });
    const view = table.views.find((one) => one.key === state.eps);
    table.heads[table.place.score].firstElementChild.lastChild.textContent = ` ${NAMES[state.metric]}, ${short(view)}`;
    const more = table.section.querySelector('.more');
    more.hidden = part.length === shown.length;
    more.firstElementChild.textContent = `Show all ${shown.length}`;
    byId('status').textContent = `${shown.length} of ${table.rows.length} models, ${words()}${part.length < shown.length ? `; the first ${part.length} are drawn` : ''}`;
    laterPlots();
  }

  function words() {
    const view = state.table.views.find((one) => one.key === state.eps);
    return `ranked by ${NAMES[state.metric]}, ${view.label}`;
  }

  // ---- download

  function cell(value) {
    if (value == null) return '';
    if (typeof value === 'number') return String(value);
    const text = String(value).replace(/[\u0000-\u001f\u007f-\u009f]/g, ' ').trim();
    return `"${(/^[=+\-@＝＋－＠]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;
  }

  function exported(row, column) {
    const rounded = (value) => (value == null ? null : Number((100 * value).toFixed(3)));
    const found = score(row);
    if (column.key === 'rank') return found?.[4] ?? null;
    if (column.key === 'score' || column.key === 'best') return rounded(found?.[column.key === 'best' ? 3 : 0]);
    if (column.key === 'model') return row.id;
    if (column.key.includes('.')) return rounded(keyOf(row, column.key));
    if (column.key === 'flags') return [[row.warnings, 'warning'], [row.notes, 'note']].filter(([number]) => number).map(([number, word]) => `${number} ${word}${number > 1 ? 's' : ''}`).join(', ');
    if (column.kind === 'links' && column.key !== 'paper') {
      const links = row.line.cells[state.table.place[column.key]].querySelectorAll('a');
      return Array.from(links, (link) => link.getAttribute('href')).join(' ');
    }
    return row[column.key];
  }

  function csv() {
    const keys = state.columns ?? usual(state.table);
    const columns = state.table.columns.filter((column, index) => index < 2 || keys.has(column.key));
    const heads = columns.map((column) => {
      if (column.key === 'rank' || column.key === 'score' || column.key === 'best') return `${column.label} (${words().replace('ranked by ', '')})`;
      return column.key.includes('.') ? `${column.label} (percent)` : column.label;
    });
    const lines = [heads.map(cell), ...shown.map((row) => columns.map((column) => cell(exported(row, column))))];
    return `${lines.map((line) => line.join(',')).join('\r\n')}\r\n`;
  }

  function download() {
    const url = URL.createObjectURL(new Blob(['\ufeff', csv()], { type: 'text/csv;charset=utf-8' }));
    const link = make('a', { href: url, download: `segbench-${state.table.dataset.replace(/[^\w-]+/g, '-')}.csv` });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  // ---- plots: drawn when they are on the screen, after the table

  const PLOTS = Object.keys(DATA.specs).map((name) => ({ name, element: byId(`plot-${name}`), seen: false, stale: true, view: null, turn: 0 }));
  let waiting = 0;

  function laterPlots() {
    for (const plot of PLOTS) plot.stale = true;
    clearTimeout(waiting);
    waiting = setTimeout(() => PLOTS.forEach(drawPlot), 60);
  }

  function inPlots() {
    if (state.ticked.size) return [...state.ticked].map((id) => state.table.byName.get(id));
    return shown.filter((row) => score(row)).sort((a, b) => score(b)[0] - score(a)[0]).slice(0, UNTICKED);
  }

  const tenth = (value) => (value == null ? null : Number((100 * value).toFixed(1)));

  function curveData() {
    return inPlots().flatMap((row) =>
      ['clean', ...state.table.radii].filter((view) => row.scores[view]).map((view) => {
        const point = { model: row.id, eps: view === 'clean' ? 0 : Number(view) };
        for (const metric of METRICS) {
          const [value, low, high] = score(row, view, metric) ?? [null, null, null];
          Object.assign(point, { [metric]: tenth(value), [`${metric}_low`]: tenth(low), [`${metric}_high`]: tenth(high) });
        }
        return point;
      }),
    );
  }

  function robustView() {
    return state.eps === 'clean' ? 'mean' : state.eps;
  }

  function pointData() {
    return shown.map((row) => ({
      model: row.id,
      tier: row.tier,
      clean: tenth(score(row, 'clean')?.[0]),
      robust: tenth(score(row, robustView())?.[0]),
      parameters: row.parameters == null ? null : row.parameters / 1e6,
      ticked: state.ticked.has(row.id),
    })).filter((point) => point.robust != null);
  }

  // those that no other row beats in both scores
  function front(points) {
    const whole = points.filter((point) => point.clean != null).sort((a, b) => b.clean - a.clean || b.robust - a.robust);
    let best = -1;
    return whole.filter((point) => point.robust > best && ((best = point.robust), true)).reverse();
  }

  function colour(name) {
    const probe = make('span', { hidden: true });
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  }

  function filledIn(value, words) {
    if (typeof value === 'string') return value.replace(/\{(\w+)\}/g, (all, name) => words[name] ?? all);
    if (Array.isArray(value)) return value.map((one) => filledIn(one, words));
    if (value && typeof value === 'object') return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, filledIn(one, words)]));
    return value;
  }

  function configuration() {
    const [ink, soft, line] = ['ink', 'soft', 'line'].map(colour);
    const dark = matchMedia('(prefers-color-scheme: dark)').matches;
    const isDark = (document.documentElement.dataset.theme ?? (dark ? 'dark' : 'light')) === 'dark';
    const lines = isDark
      ? ['#6cb2f5', '#f2a15f', '#67d3a4', '#e692c9', '#e3cd5c', '#b39ef2', '#9fb0c0', '#f08585']
      : ['#1f6fb5', '#c2570c', '#14805e', '#b03a86', '#8a6d00', '#6a4fc0', '#59636e', '#b3262e'];
    const axis = { labelColor: soft, titleColor: soft, gridColor: line, domainColor: soft, tickColor: soft, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 'normal', titlePadding: 8 };
    const font = getComputedStyle(document.body).fontFamily;
    return { font, axis, legend: { labelColor: ink, titleColor: soft, labelFontSize: 12, symbolFillColor: soft }, range: { category: lines }, text: { color: ink } };
  }

  function showTip(_handler, event, _item, value) {
    const tip = byId('tip');
    tip.hidden = value == null || value === '';
    if (tip.hidden) return;
    tip.textContent = Object.entries(value).map(([name, one]) => `${name}: ${one}`).join('\n');
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 4))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 4))}px`;
  }

  function drawable(name, { curve, points }) {
    if (name === 'pareto') return points.some((point) => point.clean != null);
    return name === 'size' ? points.some((point) => point.parameters) : curve.length > 0;
  }

  async function drawPlot(plot) {
    if (!plot.seen || !plot.stale || !window.vegaEmbed) return;
    plot.stale = false;
    const turn = (plot.turn += 1);
    const view = state.table.views.find((one) => one.key === robustView());
    const points = pointData();
    const words = { robust: `${NAMES[state.metric]}, ${view.label}`, clean: `clean ${NAMES[state.metric]}`, point: colour('accent'), ticked: colour('warm') };
    const data = { curve: curveData(), points, front: front(points) };
    if (!drawable(plot.name, data)) {
      plot.view?.finalize();
      plot.view = null;
      plot.element.textContent = 'Nothing to draw.';
      return;
    }
    const spec = filledIn(DATA.specs[plot.name], words);
    spec.datasets = data;
    const renderer = points.length > 400 ? 'canvas' : 'svg';
    const made = await window.vegaEmbed(plot.element, spec, { ast: true, actions: false, defaultStyle: false, logLevel: 1, renderer, tooltip: showTip, config: configuration() });
    if (turn !== plot.turn) return;
    plot.view?.finalize();
    plot.view = made.view;
    plot.element.dataset.drawn = String(turn);
    if (plot.stale) drawPlot(plot);
  }

  function watchPlots() {
    const observer = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const plot = PLOTS.find((one) => one.element === entry.target);
        plot.seen = entry.isIntersecting;
        drawPlot(plot);
      }
    }, { rootMargin: '200px' });
    for (const plot of PLOTS) observer.observe(plot.element);
  }

  // ---- start

  byId('controls').addEventListener('submit', (event) => event.preventDefault());
  byId('search').addEventListener('input', (event) => change({ q: event.target.value.slice(0, 200) }, { replace: true }));
  byId('csv').addEventListener('click', download);
  byId('reset').addEventListener('click', () => change(fresh(state.table)));
  byId('plots-note').textContent = `The lines show the ticked models, or the best ${UNTICKED} while none is ticked; at most ${DATA.series}. Bars are 95% intervals. The numbers are those of the table above.`;
  document.addEventListener('theme', laterPlots);
  document.addEventListener('keydown', (event) => event.key === 'Escape' && byId('chooser').removeAttribute('open'));
  window.addEventListener('popstate', () => {
    if (location.hash && !location.hash.includes('=')) return; // a place on the page
    state = fromHash(location.hash);
    draw();
  });
  window.addEventListener('load', watchPlots);
  state = fromHash(location.hash);
  draw();
})();
