// Bundles the extension into dist/extension.js, or with --tests the unit tests into dist-test/.
import { build } from "esbuild";
import { copyFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
const tests = process.argv.includes("--tests");
const common = {
    absWorkingDir: root,
    bundle: true,
    platform: "node",
    target: "node20",
    format: "cjs",
    logLevel: "warning",
};

if (tests) {
    rmSync(join(root, "dist-test"), { recursive: true, force: true });
    const names = readdirSync(join(root, "test")).filter((name) => name.endsWith(".test.ts"));
    await build({
        ...common,
        entryPoints: names.map((name) => `test/${name}`),
        outdir: "dist-test",
        sourcemap: "inline",
    });
} else {
    rmSync(join(root, "dist"), { recursive: true, force: true });
    const { metafile } = await build({
        ...common,
        metafile: true,
        // In two files: the language client is loaded with the first document, not at start-up.
        entryPoints: ["src/extension.ts", "src/run.ts"],
        outdir: "dist",
        // "./run" stays a file of its own; no bundled module may ask for another "./run".
        external: ["vscode", "./run"],
        // The editor gives the module "vscode" to require, not to import.
        supported: { "dynamic-import": false },
        minify: true,
        legalComments: "external",
    });
    const meta = process.argv.find((argument) => argument.startsWith("--meta="));
    if (meta !== undefined) {
        writeFileSync(meta.slice("--meta=".length), JSON.stringify(metafile));
    }
    copyFileSync(join(root, "..", "..", "LICENSE"), join(root, "LICENSE"));
}
