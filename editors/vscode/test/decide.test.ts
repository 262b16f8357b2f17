import assert from "node:assert/strict";
import { test } from "node:test";

import { decide, flipped, type Place, type Values } from "../src/decide";

const NOTHING: Place = { plain: undefined, language: undefined };

function values(folder: Partial<Place>, workspace: Partial<Place>, user: Partial<Place>, byDefault = true): Values {
    return {
        places: [folder, workspace, user].map((place) => ({ ...NOTHING, ...place })),
        byDefault,
    };
}

test("the default holds when nobody says anything", () => {
    assert.equal(decide(values({}, {}, {})), true);
    assert.equal(decide(values({}, {}, {}, false)), false);
});

test("off in a workspace is off for the languages that the person turned on, too", () => {
    assert.equal(decide(values({}, { plain: false }, { language: true })), false);
});

test("only one language: off in general, on for it", () => {
    assert.equal(decide(values({}, {}, { plain: false, language: true })), true);
    assert.equal(decide(values({}, {}, { plain: false })), false);
});

test("a plain on undoes a wider off, but not what is off by default", () => {
    assert.equal(decide(values({}, { plain: true }, { plain: false })), true);
    assert.equal(decide(values({}, { plain: true }, {}, false)), false);
});

test("a folder decides before its workspace", () => {
    assert.equal(decide(values({ language: true }, { plain: false }, {})), true);
});

test("turning off and on again leaves nothing in the settings", () => {
    for (const what of ["plain", "language"] as const) {
        assert.equal(flipped(values({}, {}, {}), 2, what), false);
        assert.equal(flipped(values({}, {}, { [what]: false }), 2, what), undefined);
    }
});

test("flipping always changes the outcome where the place can", () => {
    const states = [undefined, true, false];
    for (const byDefault of [true, false]) {
        for (const plain of states) {
            for (const language of states) {
                const before = values({}, {}, { plain, language }, byDefault);
                const written = flipped(before, 2, "language");
                const after = values({}, {}, { plain, language: written }, byDefault);
                assert.notEqual(decide(after), decide(before));
            }
        }
    }
});
