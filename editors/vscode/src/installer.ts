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
    if (has("uv", machine)) {
        offered.push({ tool: "uv", command: "uv tool install albor" });
    }
    if (has("pipx", machine)) {
        offered.push({ tool: "pipx", command: "pipx install albor" });
    }
    if (offered.length === 0) {
        const python = machine.platform === "win32" ? "py" : "python3";
        offered.push({ tool: "pip", command: `${python} -m pip install --user albor` });
    }
    return offered;
}

function has(tool: string, machine: Machine): boolean {
    const windows = machine.platform === "win32";
    const kind = windows ? path.win32 : path.posix;
    const folders = (machine.env["PATH"] ?? machine.env["Path"] ?? "").split(windows ? ";" : ":");
    folders.push(kind.join(machine.home, ".local", "bin"), kind.join(machine.home, ".cargo", "bin"));
    return folders
        .filter((folder) => kind.isAbsolute(folder))
        .some((folder) => machine.canRun(kind.join(folder, windows ? `${tool}.exe` : tool)));
}
