// Where questions are written. Enter sends, Shift and Enter begins a line; an Enter that ends the composition of a
// character (Japanese, Chinese, Korean input) does neither.
import { byId, fill, icon } from "./dom.js";

/** Whether this key press means "send". */
export const sendsOn = (event) =>
  event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

export class Composer {
  /** act: send(text), stop(), editLast() */
  constructor(act) {
    this.act = act;
    this.area = byId("prompt");
    this.button = byId("send");
    this.busy = false;
    this.area.addEventListener("input", () => this.#fit());
    this.area.addEventListener("keydown", (event) => this.#key(event));
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#press();
    });
    this.setBusy(false);
  }

  /** While an answer comes the button stops it. */
  setBusy(busy) {
    this.busy = busy;
    const label = busy ? "Stop" : "Send";
    fill(this.button, icon(busy ? "stop" : "send"));
    this.button.classList.toggle("busy", busy);
    this.button.setAttribute("aria-label", label);
    this.button.title = busy ? "Stop (Escape)" : "Send (Enter)";
    this.#fit();
  }

  /** Go there, but not on a screen that would show its keyboard for it. */
  focus() {
    if (!matchMedia("(hover: none)").matches) this.area.focus({ preventScroll: true });
  }

  #key(event) {
    if (sendsOn(event)) {
      event.preventDefault();
      if (!this.busy) this.#press();
    } else if (event.key === "ArrowUp" && !this.area.value) {
      event.preventDefault();
      this.act.editLast();
    }
  }

  #press() {
    if (this.busy) return this.act.stop();
    const text = this.area.value.trim();
    if (text && this.act.send(text) !== false) {
      this.area.value = "";
      this.#fit();
    }
    return undefined;
  }

  #fit() {
    this.button.disabled = !this.busy && !this.area.value.trim();
    this.area.style.height = "auto";
    this.area.style.height = `${Math.min(this.area.scrollHeight, innerHeight * 0.4)}px`;
  }
}
