// Bundles the page into octad/serve/page:  npm ci && npm run build
//
// One entry (app.js) and two parts that load when first needed: math.js (KaTeX) and code.js (highlight.js). Styles and
// fonts are copied beside them. manifest.json names every file with its type, size and SHA-256; the server serves what it
// names and nothing else, and a test checks it. The same sources and package-lock.json give the same bytes.
import { createHash } from "node:crypto";
import { cpSync, mkdirSync, readFileSync, readdirSync, rmSync, statSync, writeFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const HERE = dirname(fileURLToPath(import.meta.url));
const OUT = process.argv[2] ?? join(HERE, "..", "octad", "serve", "page", "static");
const MODULES = join(HERE, "node_modules");
const TYPES = {
  html: "text/html; charset=utf-8",
  js: "text/javascript; charset=utf-8",
  css: "text/css; charset=utf-8",
  svg: "image/svg+xml",
  woff2: "font/woff2",
  txt: "text/plain; charset=utf-8",
};
const VENDORED = [
  ["streaming-markdown", "license", "the Markdown parser, in app.js"],
  ["@highlightjs/cdn-assets", "LICENSE", "syntax highlighting, in code.js"],
  ["katex", "LICENSE", "formulas: math.js, math.css, and fonts/ (the fonts are under the same licence)"],
];

rmSync(OUT, { recursive: true, force: true });
mkdirSync(join(OUT, "fonts"), { recursive: true });

await build({
  entryPoints: {
    app: join(HERE, "src", "main.js"),
    code: join(HERE, "src", "highlight.js"),
    math: join(HERE, "src", "katex.js"),
  },
  outdir: OUT,
  bundle: true,
  format: "esm",
  minify: true,
  target: ["chrome111", "firefox113", "safari16.4"],
  external: ["./code.js", "./math.js"],
  legalComments: "none",
  charset: "utf8",
});
for (const name of ["index.html", "icon.svg", "theme.js"]) cpSync(join(HERE, "src", name), join(OUT, name));
const styles = readdirSync(join(HERE, "src", "styles")).sort();
writeFileSync(
  join(OUT, "style.css"),
  styles.map((name) => readFileSync(join(HERE, "src", "styles", name), "utf8")).join("\n"),
);

const katex = join(MODULES, "katex", "dist");
for (const name of readdirSync(join(katex, "fonts")).filter((file) => file.endsWith(".woff2"))) {
  cpSync(join(katex, "fonts", name), join(OUT, "fonts", name));
}
// Every browser that runs the page reads woff2; the older forms of the fonts stay out.
const older = /,url\([^)]*\.(?:woff|ttf)\) format\("(?:woff|truetype)"\)/g;
writeFileSync(join(OUT, "math.css"), readFileSync(join(katex, "katex.min.css"), "utf8").replace(older, ""));

const notices = VENDORED.map(([name, licence, what]) => {
  const { version, license } = JSON.parse(readFileSync(join(MODULES, name, "package.json"), "utf8"));
  return `${name} ${version} (${license}): ${what}\n\n${readFileSync(join(MODULES, name, licence), "utf8").trim()}\n`;
});
writeFileSync(
  join(OUT, "LICENCES.txt"),
  `What the page contains besides octad's own code.\n\n${notices.join(`\n${"-".repeat(80)}\n\n`)}`,
);

function filesUnder(folder) {
  return readdirSync(folder)
    .sort()
    .flatMap((name) => {
      const path = join(folder, name);
      return statSync(path).isDirectory() ? filesUnder(path) : [path];
    });
}
const files = Object.fromEntries(
  filesUnder(OUT).map((path) => {
    const body = readFileSync(path);
    return [
      relative(OUT, path),
      {
        type: TYPES[path.split(".").pop()],
        bytes: body.length,
        sha256: createHash("sha256").update(body).digest("hex"),
      },
    ];
  }),
);
writeFileSync(join(OUT, "manifest.json"), `${JSON.stringify({ files }, null, 2)}\n`);
for (const [name, { bytes }] of Object.entries(files))
  if (!name.startsWith("fonts/")) console.log(String(bytes).padStart(8), name);
