// Which command would install albor here. It is shown to the person, who decides.

import type { Machine } from "./find";
import * as path from "node:path";

/** One way to install albor. */
export interface Way {
    /** The tool that does it. */
    readonly tool: "uv" | "pipx" | "pip";
    /** The command as one types it into a terminal. */
    readonly command: string;
}

/**
 * The ways that this machine offers, best first. Where neither uv nor pipx is there, pip into the
 * person's own folder is what remains.
 */
export function ways(machine: Machine): Way[] {
    const offered: Way[] = [];
    const uv = runnable("uv", machine);
    if (uv !== undefined) {
        offered.push({ tool: "uv", command: `${uv} tool install albor` });
    }
    const pipx = runnable("pipx", machine);
    if (pipx !== undefined) {
        offered.push({ tool: "pipx", command: `${pipx} install albor` });
    }
    if (offered.length === 0) {
        const python = machine.platform === "win32" ? "py" : "python3";
        offered.push({ tool: "pip", command: `${python} -m pip install --user albor` });
    }
    return offered;
}

/** How a terminal calls `tool`: by name where the PATH has it, else by its place; or undefined. */
function runnable(tool: string, machine: Machine): string | undefined {
    const windows = machine.platform === "win32";
    const kind = windows ? path.win32 : path.posix;
    const file = windows ? `${tool}.exe` : tool;
    const here = (folder: string): boolean =>
        kind.isAbsolute(folder) && machine.canRun(kind.join(folder, file));
    const onPath = (machine.env["PATH"] ?? machine.env["Path"] ?? "").split(windows ? ";" : ":");
    if (onPath.some(here)) {
        return tool;
    }
    const home = [".local", ".cargo"].map((name) => kind.join(machine.home, name, "bin"));
    const folder = home.find(here);
    if (folder === undefined) {
        return undefined;
    }
    const full = kind.join(folder, file);
    // PowerShell runs a quoted path only after its call operator; cmd knows none.
    return full.includes(" ") ? (windows ? `& "${full}"` : `"${full}"`) : full;
}
