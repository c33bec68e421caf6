// A menu at a button: arrow keys, Escape, and a press outside close it; the button gets the focus back.
import { el } from "./dom.js";

/** items: [{label, action, danger?}] */
export function openMenu(anchor, items) {
  const menu = el(
    "div",
    { class: "menu", role: "menu" },
    items.map(({ label, action, danger }) =>
      el(
        "button",
        {
          type: "button",
          role: "menuitem",
          tabindex: "-1",
          class: danger ? "danger" : null,
          onclick: () => {
            close();
            action();
          },
        },
        label,
      ),
    ),
  );
  const buttons = [...menu.children];
  function close() {
    menu.remove();
    anchor.setAttribute("aria-expanded", "false");
    document.removeEventListener("pointerdown", outside, true);
    removeEventListener("resize", close);
    anchor.focus();
  }
  function outside(event) {
    if (!menu.contains(event.target)) close();
  }
  menu.addEventListener("keydown", (event) => {
    const at = buttons.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (event.key === "Escape" || event.key === "Tab") close();
    else if (to === undefined) return;
    else buttons[(to + buttons.length) % buttons.length].focus();
    event.preventDefault();
    event.stopPropagation();
  });
  document.addEventListener("pointerdown", outside, true);
  addEventListener("resize", close);
  anchor.setAttribute("aria-expanded", "true");
  (anchor.closest("aside, main") ?? document.body).append(menu);
  place(menu, anchor.getBoundingClientRect());
  buttons[0].focus();
}

/** Put a floating element below a box, or above it where there is no room, inside the window. */
export function place(element, box) {
  const { width, height } = element.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, innerWidth - width - 8));
  const below = box.bottom + 6;
  const top = below + height > innerHeight - 8 ? Math.max(8, box.top - height - 6) : below;
  Object.assign(element.style, { left: `${left}px`, top: `${top}px` });
}
