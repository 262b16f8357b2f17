import assert from "node:assert/strict";
import { test } from "node:test";

import { Backoff } from "../src/backoff";

test("the pause doubles up to half a minute", () => {
    const backoff = new Backoff();
    const pauses = Array.from({ length: 9 }, () => backoff.died(1000));
    assert.deepEqual(pauses, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]);
});

test("a server that ran for a minute starts the counting anew", () => {
    const backoff = new Backoff();
    backoff.died(0);
    backoff.died(0);
    assert.equal(backoff.died(60_000), 500);
    assert.equal(backoff.died(0), 1000);
});

test("a start by hand starts the counting anew", () => {
    const backoff = new Backoff();
    backoff.died(0);
    backoff.reset();
    assert.equal(backoff.died(0), 500);
});
