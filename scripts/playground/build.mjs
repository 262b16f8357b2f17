// Bundle the editor library and the licences of everything in it.
import { build } from "esbuild";
import { existsSync, readFileSync, writeFileSync } from "node:fs";

const out = new URL("../../albor_serve/api/playground/assets/", import.meta.url).pathname;
const result = await build({
  entryPoints: [new URL("entry.js", import.meta.url).pathname],
  bundle: true,
  minify: true,
  format: "esm",
  metafile: true,
  outfile: `${out}editor.min.js`,
  banner: { js: "/* CodeMirror 6 and its dependencies, MIT: see editor.LICENSE.txt */" },
});

const folders = new Set();
for (const input of Object.keys(result.metafile.inputs)) {
  const found = input.match(/^.*node_modules\/(?:@[^/]+\/)?[^/]+/);
  if (found) folders.add(found[0]);
}
const notices = [...folders].sort().map((folder) => {
  const { name, version } = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
  const file = ["LICENSE", "LICENSE.md", "LICENSE.txt"].find((n) => existsSync(`${folder}/${n}`));
  if (!file) throw new Error(`${name} ships no licence: add its text by hand`);
  return `${name} ${version}\n\n${readFileSync(`${folder}/${file}`, "utf8").trim()}\n`;
});
writeFileSync(`${out}editor.LICENSE.txt`, notices.join(`\n${"-".repeat(72)}\n\n`));
