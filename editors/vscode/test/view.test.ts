import assert from "node:assert/strict";
import { test } from "node:test";

import { readStatus, view, type Facts } from "../src/view";

const READY = readStatus({
    state: "ready",
    model: "albor-33m",
    server: "127.0.0.1:8080",
    latency: { decode_ms: 30.2, prefill_ms: 8.31, num_new_tokens: 3 },
});

const FACTS: Facts = {
    phase: "running",
    reason: "",
    server: READY,
    paused: false,
    off: "",
    lastMs: 41.7,
};

test("ready: the last latency, the model and its parts", () => {
    const seen = view(FACTS);
    assert.equal(seen.text, "$(sparkle) 42 ms");
    assert.match(seen.tooltip, /Model: albor-33m at 127\.0\.0\.1:8080/);
    assert.match(seen.tooltip, /: 42 ms \(prefill 8\.3 ms, decode 30 ms\)/);
    assert.equal(seen.warning, false);
});

test("before the first suggestion the name is shown", () => {
    assert.equal(view({ ...FACTS, lastMs: undefined }).text, "$(sparkle) albor");
});

for (const [change, text, warning] of [
    [{ paused: true }, "$(debug-pause) albor", false],
    [{ off: "off for markdown" }, "$(circle-slash) albor", false],
    [{ phase: "starting" }, "$(loading~spin) albor", false],
    [{ phase: "running", server: undefined }, "$(loading~spin) albor", false],
    [{ phase: "idle", lastMs: undefined }, "$(sparkle) albor", false],
    [{ phase: "waiting", reason: "stopped" }, "$(warning) albor", true],
    [{ phase: "missing", reason: "not found" }, "$(warning) albor", true],
    [{ phase: "missing", reason: "not found", paused: true }, "$(warning) albor", true],
    [{ server: readStatus({ state: "down", message: "no model" }) }, "$(warning) albor", true],
    [{ server: readStatus({ state: "loading" }) }, "$(loading~spin) albor", false],
] as const) {
    test(`${JSON.stringify(change)} shows ${text}`, () => {
        const seen = view({ ...FACTS, ...change });
        assert.equal(seen.text, text);
        assert.equal(seen.warning, warning);
    });
}

test("what the server says reaches the tooltip, and can't be Markdown", () => {
    const server = readStatus({ state: "down", message: "see [x](command:y)" });
    assert.match(view({ ...FACTS, server }).tooltip, /see \\\[x\\\]\\\(command:y\\\)/);
});

test("a status of another shape is taken as empty, not as a fault", () => {
    for (const message of [null, 3, "x", [], { state: 4, latency: { a: "b", b: NaN } }]) {
        assert.deepEqual(readStatus(message), {
            state: "",
            message: "",
            model: "",
            server: "",
            latency: {},
        });
    }
});
