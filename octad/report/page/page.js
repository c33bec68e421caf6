// Sorting, light and dark, copying. The page reads well without it; on paper is what is open on the screen.
"use strict";
(() => {
  const key = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    return cell.textContent.trim().toLowerCase();
  };
  const missing = (value) => value === "" || value === "–";
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), undefined, { numeric: true });
  };

  const sort = (header) => {
    const table = header.closest("table");
    const column = header.cellIndex;
    const falling = header.getAttribute("aria-sort") === "ascending";
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => ({ row, value: key(row, column) }));
    rows.sort((a, b) => {
      if (missing(a.value) || missing(b.value)) return missing(a.value) - missing(b.value);
      return falling ? compare(b.value, a.value) : compare(a.value, b.value);
    });
    body.append(...rows.map((r) => r.row));
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", falling ? "descending" : "ascending");
  };
  for (const button of document.querySelectorAll("thead button")) {
    button.addEventListener("click", () => sort(button.parentElement));
  }

  // a place that scrolls is reached with the keyboard, and says that there is more; others are no stop on the way
  const places = document.querySelectorAll(".scroll");
  const fade = (place) => {
    const left = place.scrollWidth - place.clientWidth - place.scrollLeft;
    place.classList.toggle("cut", left > 1);
  };
  const mind = () => {
    for (const place of places) {
      const spills = place.scrollWidth > place.clientWidth;
      place.tabIndex = spills ? 0 : -1;
      place.previousElementSibling.hidden = !spills;
      fade(place);
    }
  };
  for (const place of places) place.addEventListener("scroll", () => fade(place), { passive: true });
  mind();
  addEventListener("resize", mind);
  document.addEventListener("toggle", mind, true);

  const themes = ["auto", "light", "dark"];
  const stored = () => { try { return localStorage.getItem("octad-theme"); } catch { return null; } };
  const toggle = document.getElementById("theme");
  const show = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    toggle.textContent = { auto: "◐ Auto", light: "○ Light", dark: "● Dark" }[theme];
    toggle.setAttribute("aria-label", `Theme: ${theme}; press for the next`);
    try { localStorage.setItem("octad-theme", theme); } catch { /* a page from disk may not store */ }
  };
  let theme = themes.includes(stored()) ? stored() : "auto";
  show(theme);
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    show(theme);
  });

  for (const button of document.querySelectorAll("button.copy")) {
    if (!navigator.clipboard) continue;
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
        button.textContent = "Copied";
      } catch { button.textContent = "Not allowed"; }
    });
  }
})();
