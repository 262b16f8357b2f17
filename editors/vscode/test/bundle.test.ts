import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { test } from "node:test";

const ROOT = join(__dirname, "..");
const META = join(ROOT, "dist-test", "meta.json");

test("only the extension itself asks for the file that is loaded late", () => {
    execFileSync(process.execPath, ["scripts/build.mjs", `--meta=${META}`], { cwd: ROOT });
    assert.ok(existsSync(join(ROOT, "dist", "run.js")));
    const meta = createRequire(__filename)(META) as {
        inputs: Record<string, { imports: { path: string; external?: boolean }[] }>;
    };
    const askers = Object.entries(meta.inputs)
        .filter(([, { imports }]) => imports.some((each) => each.external === true && each.path === "./run"))
        .map(([file]) => file);
    assert.deepEqual(askers, ["src/session.ts"]);
});
