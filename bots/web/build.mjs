// Sources in, the page that the bots serve out: built/ is kept in git, so that serving it needs no node.

import { build } from "esbuild";
import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const at = (...parts) => join(here, ...parts);
const digest = (path) => createHash("sha256").update(readFileSync(at(path))).digest("hex");
const digests = (paths) => Object.fromEntries(paths.sort().map((path) => [path, digest(path)]));

rmSync(at("built"), { recursive: true, force: true });
mkdirSync(at("built"));

const { metafile } = await build({
  absWorkingDir: here,
  entryPoints: ["src/page.js", "src/page.css"],
  outdir: "built",
  alias: { "@daily-co/daily-js": "./src/no_daily.js" },
  bundle: true,
  format: "esm",
  minify: true,
  pure: ["console.log"], // a dependency chats
  target: ["chrome111", "firefox128", "safari16.4"],
  legalComments: "none", // licenses.txt has them whole
  logLevel: "info",
  metafile: true,
});

// The licences of what went into the bundle ask to travel with it.
const packages = new Set(
  Object.keys(metafile.inputs).flatMap((path) => path.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)/)?.[1] ?? []),
);
const licenses = [...packages].sort().map((name) => {
  const { version, license } = JSON.parse(readFileSync(at("node_modules", name, "package.json")));
  const file = readdirSync(at("node_modules", name)).find((entry) => /^licen[cs]e/i.test(entry));
  return `${name} ${version} (${license})\n\n${file ? readFileSync(at("node_modules", name, file), "utf8").trim() : ""}\n`;
});
writeFileSync(at("built/licenses.txt"), licenses.join(`\n${"-".repeat(80)}\n\n`));

const version = digest("built/page.js").slice(0, 6) + digest("built/page.css").slice(0, 6);
writeFileSync(at("built/index.html"), readFileSync(at("src/index.html"), "utf8").replaceAll("{version}", version));
writeFileSync(at("built/icon.svg"), readFileSync(at("src/icon.svg")));

const sources = ["build.mjs", "package.json", "package-lock.json", ...readdirSync(at("src")).map((name) => `src/${name}`)];
const built = readdirSync(at("built")).map((name) => `built/${name}`);
writeFileSync(at("built/manifest.json"), `${JSON.stringify({ sources: digests(sources), built: digests(built) }, null, 1)}\n`);
