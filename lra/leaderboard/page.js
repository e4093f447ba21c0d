"use strict";
(() => {
  const board = document.getElementById("board"), form = document.getElementById("filters");
  const body = board.tBodies[0], rows = [...body.rows], heads = [...board.tHead.rows[0].cells];
  const count = document.getElementById("count");
  heads.forEach((head, i) => rows.forEach(row => { row.cells[i].dataset.label = head.textContent.trim(); }));

  function filter() {
    const wanted = [...form.querySelectorAll("select")].map(s => [s.name, s.value]).filter(([, value]) => value);
    const words = form.elements.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const name = row.cells[1].textContent.toLowerCase();
      row.hidden = !(wanted.every(([key, value]) => (row.dataset[key] ?? value) === value) && words.every(w => name.includes(w)));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  }

  function value(row, i) {
    const cell = row.cells[i];
    if (cell.dataset.v === undefined) return cell.textContent.trim().toLowerCase();
    return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  }

  function sort(i) {
    const ascends = heads[i].getAttribute("aria-sort") === "descending"
      || (heads[i].getAttribute("aria-sort") === null && heads[i].dataset.first !== "descending");
    heads.forEach(head => head.removeAttribute("aria-sort"));
    heads[i].setAttribute("aria-sort", ascends ? "ascending" : "descending");
    const keys = new Map(rows.map(row => [row, value(row, i)])), sign = ascends ? 1 : -1;
    rows.sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (x < y ? -1 : x > y ? 1 : 0);
    });
    body.append(...rows);
  }

  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => sort(i)));
  form.addEventListener("input", filter);
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  form.hidden = false;
  filter();
})();
