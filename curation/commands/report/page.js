// Two conveniences; the page is whole without them.  Text of the data is only ever compared, never made into markup.
"use strict";
(() => {
  const form = document.querySelector(".search");
  if (form) {
    const field = form.querySelector("input"), told = form.querySelector("output");
    const cards = [...document.querySelectorAll("[data-find]")];
    const find = () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const card of cards) {
        card.hidden = !words.every((word) => card.dataset.find.includes(word));
        shown += !card.hidden;
      }
      for (const part of document.querySelectorAll("[data-part]"))
        part.hidden = words.length > 0 && !part.querySelector("[data-find]:not([hidden])");
      told.textContent = words.length ? `${shown} of ${cards.length} samples` : `${cards.length} samples`;
    };
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    field.addEventListener("input", find);
    find();
  }
  // One stop for the Tab key in each grid of shards; arrow keys, Home and End move within.
  for (const grid of document.querySelectorAll("ol.grid")) {
    const cells = [...grid.querySelectorAll("a")];
    cells.forEach((cell, place) => { cell.tabIndex = place ? -1 : 0; });
    grid.addEventListener("keydown", (event) => {
      const here = cells.indexOf(document.activeElement);
      if (here < 0) return;
      const row = cells.filter((cell) => cell.offsetTop === cells[0].offsetTop).length || 1;
      const to = { ArrowRight: here + 1, ArrowLeft: here - 1, ArrowDown: here + row, ArrowUp: here - row, Home: 0, End: cells.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = cells[Math.min(Math.max(to, 0), cells.length - 1)];
      cells[here].tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }
})();
