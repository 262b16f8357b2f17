// Where the language server is: the setting, the PATH, or where pipx and uv put it.

import * as path from "node:path";

/** What the search may look at; the real file system in use, a made-up one in tests. */
export interface Machine {
    readonly platform: NodeJS.Platform;
    readonly home: string;
    readonly env: Readonly<Record<string, string | undefined>>;
    /** True when `file` is there and may be run. */
    readonly canRun: (file: string) => boolean;
    /** The first line of `file`, at most some hundred characters; empty when it can't be read. */
    readonly firstLine: (file: string) => string;
}

/** The program's name without an ending. */
const PROGRAM = "albor-lsp";

/**
 * Expand `~` and `${env:NAME}` in a path from the settings.
 *
 * An unset variable becomes nothing.
 */
export function expand(text: string, machine: Machine): string {
    const filled = text.replace(
        /\$\{env:([^}]+)\}/g,
        (_all, name: string) => machine.env[name] ?? "",
    );
    return filled === "~" || filled.startsWith("~/") || filled.startsWith("~\\")
        ? join(machine, machine.home, filled.slice(2))
        : filled;
}

/** Every place that is searched after the setting, in order, without doubles. */
export function places(machine: Machine): string[] {
    const { env, home } = machine;
    const windows = machine.platform === "win32";
    const file = windows ? `${PROGRAM}.exe` : PROGRAM;
    const binFolder = windows ? "Scripts" : "bin";
    const searchPath = (env["PATH"] ?? env["Path"] ?? "").split(windows ? ";" : ":");
    const data = windows
        ? (env["APPDATA"] ?? join(machine, home, "AppData", "Roaming"))
        : (env["XDG_DATA_HOME"] ?? join(machine, home, ".local", "share"));
    const folders = [
        // A relative entry would depend on the folder that the editor was started in.
        ...searchPath.filter((folder) => kind(machine).isAbsolute(folder)),
        env["UV_TOOL_BIN_DIR"],
        env["XDG_BIN_HOME"],
        env["PIPX_BIN_DIR"],
        join(machine, home, ".local", "bin"),
        join(machine, env["UV_TOOL_DIR"] ?? join(machine, data, "uv", "tools"), "albor", binFolder),
        join(machine, env["PIPX_HOME"] ?? join(machine, data, "pipx"), "venvs", "albor", binFolder),
        join(machine, home, windows ? "pipx" : ".local/pipx", "venvs", "albor", binFolder),
        ...(windows ? [] : ["/opt/homebrew/bin", "/usr/local/bin"]),
    ].filter((folder): folder is string => folder !== undefined && folder !== "");
    return [...new Set(folders.map((folder) => join(machine, folder, file)))];
}

/** The outcome of a search: a program to run, or why there is none, in one line. */
export type Found = { readonly program: string } | { readonly reason: string };

/**
 * Find `albor-lsp`.
 *
 * @param setting - the value of `albor.path`; when it is not empty nothing else is tried, so that
 *     a typo is told and not papered over.
 */
export function find(setting: string, machine: Machine): Found {
    const wanted = setting.trim();
    if (wanted !== "") {
        const program = expand(wanted, machine);
        if (!kind(machine).isAbsolute(program)) {
            return { reason: `the setting albor.path is ${wanted}, which is not a full path` };
        }
        if (!machine.canRun(program)) {
            return { reason: `the setting albor.path names ${program}, which can't be run` };
        }
        const gone = goneInterpreter(program, machine);
        return gone === undefined ? { program } : { reason: stale(program, gone) };
    }
    let reason = `${PROGRAM} was found neither on the PATH nor where pipx and uv install it`;
    for (const program of places(machine).filter((file) => machine.canRun(file))) {
        const gone = goneInterpreter(program, machine);
        if (gone === undefined) {
            return { program };
        }
        reason = stale(program, gone);
    }
    return { reason };
}

/** The interpreter that a script names and that is not there any more, as after an upgrade of
 * Python; undefined when all is well. */
function goneInterpreter(file: string, machine: Machine): string | undefined {
    const interpreter = /^#!\s*(\/\S+)/.exec(machine.firstLine(file))?.[1];
    const gone = interpreter !== undefined && !machine.canRun(interpreter);
    return gone && machine.platform !== "win32" ? interpreter : undefined;
}

function stale(program: string, interpreter: string): string {
    return `${program} needs ${interpreter}, which is gone: install albor again`;
}

function kind(machine: Machine): path.PlatformPath {
    return machine.platform === "win32" ? path.win32 : path.posix;
}

function join(machine: Machine, ...parts: string[]): string {
    return kind(machine).join(...parts);
}
