'use strict';

// ---- the table of all parts: filters and sorting ----
(() => {
  const table = document.getElementById('parts-table');
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const find = document.getElementById('find');
  const outcome = document.getElementById('outcome');
  const type = document.getElementById('type');
  const count = document.getElementById('count');

  const filter = () => {
    const wanted = find.value.trim().toLowerCase();
    let left = 0;
    for (const row of rows) {
      const fits = (!outcome.value || row.dataset.outcome === outcome.value)
        && (!type.value || row.dataset.type === type.value)
        && (!wanted || row.cells[1].dataset.v.toLowerCase().includes(wanted));
      row.hidden = !fits;
      left += fits ? 1 : 0;
    }
    count.value = `${left} of ${rows.length}`;
  };
  for (const control of [find, outcome, type]) control.addEventListener('input', filter);
  filter();

  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent : cell.dataset.v;
  };
  const compare = (a, b) => {
    const x = Number(a), y = Number(b);
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, 'en', {numeric: true}) : x - y;
  };
  const sort = (head, column) => {
    const down = head.getAttribute('aria-sort') === 'ascending';
    for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const keyed = rows.map((row, place) => [key(row, column), place, row]);
    keyed.sort(([a, i], [b, j]) => {
      if (a === '' || b === '') return (a === '') - (b === '') || i - j; // what is not known goes last either way
      return (down ? compare(b, a) : compare(a, b)) || i - j;
    });
    body.append(...keyed.map(entry => entry[2]));
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = head.textContent;
    button.addEventListener('click', () => sort(head, column));
    head.replaceChildren(button);
  });
})();

// ---- the 3D view ----
(() => {
  const source = document.getElementById('view-data');
  if (!source) return;
  const {ramp, parts} = JSON.parse(source.textContent);
  const stage = document.getElementById('view3d');
  const chooser = document.getElementById('view-part');
  const turnButton = document.getElementById('view-turn');
  const said = document.getElementById('view-said');
  const NO_POINT = 65535;
  const made = new Map();

  // the ramp in 256 steps, as colour strings
  const channels = ramp.map(code => [1, 3, 5].map(at => parseInt(code.slice(at, at + 2), 16)));
  const tints = Array.from({length: 256}, (_, heat) => {
    const place = heat / 255 * (channels.length - 1), lower = Math.min(Math.floor(place), channels.length - 2);
    const mixed = channels[lower].map((c, n) => Math.round(c + (channels[lower + 1][n] - c) * (place - lower)));
    return `rgb(${mixed})`;
  });

  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));

  // the points of a part, and the triangles between neighbours on its grid
  const surface = part => {
    if (made.has(part.index)) return made.get(part.index);
    const raw = new DataView(bytes(part.points).buffer);
    const colours = bytes(part.colours);
    const anomaly = bytes(part.anomaly);
    const {rows, columns, step_mm: step, edge_mm: longest} = part;
    const number = new Int32Array(rows * columns).fill(-1);
    const x = [], y = [], z = [], heat = [], photo = [];
    for (let p = 0; p < rows * columns; p++) {
      const [a, b, c] = [0, 2, 4].map(offset => raw.getUint16(6 * p + offset, true));
      if (a === NO_POINT) continue;
      number[p] = x.length;
      x.push(a * step - part.size_mm[0] / 2);
      y.push(b * step - part.size_mm[1] / 2);
      z.push(c * step - part.size_mm[2] / 2);
      heat.push(tints[anomaly[p]]);
      photo.push(`rgb(${colours[3 * p]},${colours[3 * p + 1]},${colours[3 * p + 2]})`);
    }
    const near = (p, q) => Math.hypot(x[p] - x[q], y[p] - y[q], z[p] - z[q]) <= longest;
    const i = [], j = [], k = [];
    const join = (p, q, r) => {
      if (p < 0 || q < 0 || r < 0 || !near(p, q) || !near(q, r) || !near(r, p)) return;
      i.push(p); j.push(q); k.push(r);
    };
    for (let row = 0; row + 1 < rows; row++) {
      for (let column = 0; column + 1 < columns; column++) {
        const p = row * columns + column;
        const [a, b, c, d] = [p, p + 1, p + columns, p + columns + 1].map(place => number[place]);
        join(a, c, b);
        join(b, c, d);
      }
    }
    const result = {x, y, z, i, j, k, heat, photo};
    made.set(part.index, result);
    return result;
  };

  const trace = part => {
    const {x, y, z, i, j, k, heat, photo} = surface(part);
    const chosen = document.querySelector('input[name=view-colour]:checked').value;
    return {
      type: 'mesh3d', x, y, z, i, j, k, vertexcolor: chosen === 'rgb' ? photo : heat,
      hoverinfo: 'skip', showscale: false, flatshading: false,
      lighting: {ambient: 0.5, diffuse: 0.55, specular: 0.03, roughness: 0.9, fresnel: 0},
      lightposition: {x: -4000, y: 6000, z: 9000},
    };
  };

  const HEIGHT = 0.85, REACH = 1.35; // the eye's angle above the part (radians) and its distance
  let angle = -Math.PI / 2;
  const reach = () => REACH * Math.max(1, 1.2 * stage.clientHeight / stage.clientWidth); // narrow stages: step back
  const eye = () => ({
    eye: {
      x: reach() * Math.cos(HEIGHT) * Math.cos(angle),
      y: reach() * Math.cos(HEIGHT) * Math.sin(angle),
      z: reach() * Math.sin(HEIGHT),
    },
    up: {x: 0, y: 0, z: 1}, center: {x: 0, y: 0, z: -0.05},
  });
  const layout = (part, camera) => {
    const half = 0.51 * Math.max(...part.size_mm); // one range for all axes: true proportions
    const axis = {visible: false, showspikes: false, range: [-half, half]};
    return {
      margin: {l: 0, r: 0, t: 0, b: 0}, paper_bgcolor: '#e4e8ee',
      scene: {aspectmode: 'cube', dragmode: 'turntable', camera, xaxis: axis, yaxis: axis, zaxis: axis},
    };
  };
  const current = () => parts[Number(chooser.value)];

  let drawn = false, turning = false, seen = false, last = 0;
  const draw = async () => {
    const camera = drawn ? stage._fullLayout.scene.camera : eye();
    const part = current();
    try {
      const options = {displayModeBar: false, responsive: true, scrollZoom: true};
      await Plotly.react(stage, [trace(part)], layout(part, camera), options);
      drawn = true;
    } catch (error) {
      stage.innerHTML = '<p>The 3D view needs WebGL, which this browser lacks. The rest of the page is complete.</p>';
      setTurning(false);
    }
    said.value = part.size_mm.map(extent => extent.toFixed(extent < 10 ? 1 : 0)).join(' \u00d7 ') + ' mm';
  };
  const setTurning = on => {
    turning = on;
    turnButton.textContent = on ? 'Pause' : 'Turn';
    turnButton.setAttribute('aria-pressed', String(on));
    if (on && drawn) {
      const {x, y} = stage._fullLayout.scene.camera.eye;
      if (Math.hypot(x, y) > 0.05) angle = Math.atan2(y, x);
    }
  };
  const step = now => {
    requestAnimationFrame(step);
    if (!turning || !seen || !drawn || document.hidden || now - last < 40) return;
    angle += Math.min(now - last, 100) * 0.00035;
    last = now;
    Plotly.relayout(stage, {'scene.camera': eye()});
  };

  chooser.addEventListener('input', draw);
  for (const choice of document.getElementsByName('view-colour')) choice.addEventListener('input', draw);
  turnButton.addEventListener('click', () => setTurning(!turning));
  document.getElementById('view-front').addEventListener('click', () => {
    setTurning(false);
    if (!drawn) return;
    const [x, y, z] = current().camera.map(share => share * reach());
    const [upX, upY, upZ] = current().up;
    const camera = {eye: {x, y, z}, up: {x: upX, y: upY, z: upZ}, center: {x: 0, y: 0, z: 0}};
    Plotly.relayout(stage, {'scene.camera': camera});
  });
  for (const kind of ['pointerdown', 'wheel', 'touchstart']) {
    stage.addEventListener(kind, () => setTurning(false), {passive: true, capture: true});
  }
  for (const link of document.querySelectorAll('.to3d')) {
    link.addEventListener('click', () => {
      chooser.value = String(parts.findIndex(part => part.index === Number(link.dataset.part)));
      draw();
    });
  }
  requestAnimationFrame(step);
  new IntersectionObserver(entries => {
    seen = entries.some(entry => entry.isIntersecting);
    if (seen && !drawn) draw().then(() => setTurning(drawn && !matchMedia('(prefers-reduced-motion: reduce)').matches));
  }, {rootMargin: '200px'}).observe(stage);
})();
