// What the status bar shows, worked out from what is known. No editor in here.

/** What the extension knows of the language server's process. */
export type Phase = "idle" | "missing" | "starting" | "running" | "waiting";

/** The last `albor/status` of the language server, as far as it could be read. */
export interface ServerStatus {
    readonly state: string;
    readonly message: string;
    readonly model: string;
    /** Where the completion server is. */
    readonly server: string;
    /** Milliseconds by part, as in `prefill_ms`, and counts of tokens. */
    readonly latency: Readonly<Record<string, number>>;
}

/** All that the status bar depends on. */
export interface Facts {
    readonly phase: Phase;
    /** Why there is no server, for the phases `missing` and `waiting`. */
    readonly reason: string;
    readonly server: ServerStatus | undefined;
    readonly paused: boolean;
    /** Why the document in front gets no suggestions; empty when it does. */
    readonly off: string;
    /** From question to answer as the editor saw it; undefined before the first. */
    readonly lastMs: number | undefined;
}

/** A status bar item's looks. */
export interface View {
    readonly text: string;
    /** Markdown. */
    readonly tooltip: string;
    readonly warning: boolean;
}

/** Read an `albor/status` message; whatever is missing or of another type is left empty. */
export function readStatus(message: unknown): ServerStatus {
    const fields = isRecord(message) ? message : {};
    const latency: Record<string, number> = {};
    const parts = fields["latency"];
    if (isRecord(parts)) {
        for (const [name, value] of Object.entries(parts)) {
            if (typeof value === "number" && Number.isFinite(value)) {
                latency[name] = value;
            }
        }
    }
    return {
        state: text(fields["state"]),
        message: text(fields["message"]),
        model: text(fields["model"]),
        server: text(fields["server"]),
        latency,
    };
}

/** States in which a server answers questions. */
const WELL = new Set(["", "ready", "ok", "idle", "busy", "working", "running", "paused"]);
/** States that pass by themselves. */
const COMING = new Set(["starting", "loading", "connecting", "warming"]);

/** The status bar item for `facts`. */
export function view(facts: Facts): View {
    const [icon, state, warning] = headline(facts);
    const short =
        icon === "sparkle" && facts.lastMs !== undefined ? `${round(facts.lastMs)} ms` : "albor";
    const lines = [`**albor**: ${escape(state)}`];
    if (facts.server !== undefined && facts.server.model !== "") {
        const where = facts.server.server === "" ? "" : ` at ${facts.server.server}`;
        lines.push(escape(`Model: ${facts.server.model}${where}`));
    }
    const split = latencySplit(facts);
    if (split !== "") {
        lines.push(split);
    }
    lines.push("Click for the menu.");
    return { text: `$(${icon}) ${short}`, tooltip: lines.join("\n\n"), warning };
}

function headline(facts: Facts): [icon: string, state: string, warning: boolean] {
    if (facts.phase === "missing") {
        return ["warning", `${facts.reason}. Click to install or choose it.`, true];
    }
    if (facts.paused) {
        return ["debug-pause", "paused", false];
    }
    if (facts.off !== "") {
        return ["circle-slash", facts.off, false];
    }
    if (facts.phase === "waiting") {
        return ["warning", facts.reason, true];
    }
    if (facts.phase === "idle") {
        return ["sparkle", "starts with the first file that you open", false];
    }
    if (facts.phase === "starting") {
        return ["loading~spin", "starting", false];
    }
    const server = facts.server;
    if (server === undefined) {
        return ["loading~spin", "connecting", false];
    }
    if (COMING.has(server.state)) {
        return ["loading~spin", server.message || server.state, false];
    }
    if (!WELL.has(server.state)) {
        return ["warning", server.message || server.state, true];
    }
    return ["sparkle", server.message || "ready", false];
}

/** The parts that the server reports, in this order; others follow as they come. */
const PARTS = ["queue_ms", "prefill_ms", "first_token_ms", "decode_ms", "total_ms"];

function latencySplit(facts: Facts): string {
    if (facts.lastMs === undefined) {
        return "";
    }
    const parts = facts.server?.latency ?? {};
    const known = PARTS.filter((name) => name in parts);
    const more = Object.keys(parts).filter((name) => name.endsWith("_ms") && !known.includes(name));
    const split = [...known, ...more].map(
        (name) => `${name.slice(0, -3).replaceAll("_", " ")} ${round(parts[name] ?? 0)} ms`,
    );
    const last = `Last suggestion: ${round(facts.lastMs)} ms`;
    return split.length === 0 ? last : `${last} (${escape(split.join(", "))})`;
}

function round(ms: number): string {
    return ms < 9.5 ? ms.toFixed(1) : ms.toFixed(0);
}

function text(value: unknown): string {
    return typeof value === "string" ? value : "";
}

function isRecord(value: unknown): value is Record<string, unknown> {
    return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Text that Markdown shows as it is. */
function escape(line: string): string {
    return line.replace(/[\\`*_{}[\]()#+!|<>~$]/g, "\\$&");
}
