// Runs before anything is drawn, so that a page in the colours of one's choice does not flash in the other ones.
try {
  const { theme } = JSON.parse(localStorage.getItem("octad.settings") ?? "{}");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // a browser that keeps nothing: the system's colours
}
