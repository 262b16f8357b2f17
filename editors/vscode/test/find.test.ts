import assert from "node:assert/strict";
import { test } from "node:test";

import { expand, find, places, type Machine } from "../src/find";
import { ways } from "../src/installer";

function machine(files: string[], more: Partial<Machine> = {}): Machine {
    return {
        platform: "linux",
        home: "/home/ada",
        env: { PATH: "/usr/bin:bin::/opt/bin" },
        canRun: (file) => files.includes(file),
        firstLine: () => "",
        ...more,
    };
}

test("the setting wins over everything else", () => {
    const here = machine(["/opt/bin/albor-lsp", "/srv/albor-lsp"]);
    assert.deepEqual(find("/srv/albor-lsp", here), { program: "/srv/albor-lsp" });
});

test("a wrong setting is told and not papered over", () => {
    const here = machine(["/opt/bin/albor-lsp"]);
    const found = find("/srv/albor-lsp", here);
    assert.ok("reason" in found);
    assert.match(found.reason, /albor\.path.*\/srv\/albor-lsp/);
});

test("a relative setting is refused: it would depend on the folder that is open", () => {
    const found = find("tools/albor-lsp", machine(["tools/albor-lsp"]));
    assert.ok("reason" in found);
    assert.match(found.reason, /full path/);
});

test("the PATH comes before the folders of pipx and uv", () => {
    const here = machine(["/opt/bin/albor-lsp", "/home/ada/.local/bin/albor-lsp"]);
    assert.deepEqual(find("", here), { program: "/opt/bin/albor-lsp" });
});

const stale = {
    firstLine: (file: string) =>
        file === "/usr/bin/albor-lsp" ? "#!/usr/bin/python3.11 -I" : "#! /usr/bin/python3.12",
};

test("a program whose interpreter is gone is passed over", () => {
    const files = ["/usr/bin/albor-lsp", "/opt/bin/albor-lsp", "/usr/bin/python3.12"];
    assert.deepEqual(find("", machine(files, stale)), { program: "/opt/bin/albor-lsp" });
});

test("where only such a program is there, that is told", () => {
    for (const setting of ["", "/usr/bin/albor-lsp"]) {
        const found = find(setting, machine(["/usr/bin/albor-lsp"], stale));
        assert.ok("reason" in found);
        assert.match(found.reason, /albor-lsp needs \/usr\/bin\/python3\.11, which is gone/);
    }
});

test("relative and empty entries of the PATH are left out", () => {
    assert.ok(places(machine([])).every((file) => file.startsWith("/")));
});

for (const file of [
    "/home/ada/.local/bin/albor-lsp",
    "/home/ada/.local/share/uv/tools/albor/bin/albor-lsp",
    "/home/ada/.local/share/pipx/venvs/albor/bin/albor-lsp",
    "/home/ada/.local/pipx/venvs/albor/bin/albor-lsp",
    "/opt/homebrew/bin/albor-lsp",
]) {
    test(`an editor started without the shell's PATH still finds ${file}`, () => {
        assert.deepEqual(find("  ", machine([file], { env: {} })), { program: file });
    });
}

test("Windows: semicolons, Scripts and .exe", () => {
    const file = "C:\\Users\\ada\\AppData\\Roaming\\uv\\tools\\albor\\Scripts\\albor-lsp.exe";
    const here = machine([file], {
        platform: "win32",
        home: "C:\\Users\\ada",
        env: { Path: "C:\\Windows;D:\\tools" },
    });
    assert.deepEqual(find("", here), { program: file });
    assert.equal(places(here)[0], "C:\\Windows\\albor-lsp.exe");
});

test("no program: the reason says where was searched", () => {
    const found = find("", machine([]));
    assert.ok("reason" in found);
    assert.match(found.reason, /PATH.*pipx.*uv/);
});

test("~ and ${env:NAME} are expanded", () => {
    const here = machine([], { env: { TOOLS: "/t" } });
    assert.equal(expand("~/x", here), "/home/ada/x");
    assert.equal(expand("${env:TOOLS}/x${env:NONE}", here), "/t/x");
    assert.equal(expand("/a~b", here), "/a~b");
});

test("uv is offered before pipx, pip only without both", () => {
    const tools = (files: string[]): string[] => ways(machine(files)).map((way) => way.tool);
    assert.deepEqual(tools(["/usr/bin/pipx", "/home/ada/.local/bin/uv"]), ["uv", "pipx"]);
    assert.deepEqual(tools(["/usr/bin/pipx"]), ["pipx"]);
    assert.deepEqual(tools([]), ["pip"]);
    assert.equal(ways(machine(["/usr/bin/uv"]))[0]?.command, "uv tool install albor");
});

test("a tool that the PATH lacks is called by its place", () => {
    const commands = (home: string): (string | undefined)[] =>
        ways(machine([`${home}/.local/bin/pipx`], { home })).map((way) => way.command);
    assert.deepEqual(commands("/home/ada"), ["/home/ada/.local/bin/pipx install albor"]);
    assert.deepEqual(commands("/home/a b"), ['"/home/a b/.local/bin/pipx" install albor']);
});
