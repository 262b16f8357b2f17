// Finds, starts, watches and ends the language server of one window.

import * as fs from "node:fs";
import * as os from "node:os";
import * as vscode from "vscode";

import { Backoff } from "./backoff";
import type { Run } from "./run";
import { find, type Machine } from "./find";
import { programPath, SECTION } from "./settings";
import type { Phase, ServerStatus } from "./view";

/** The machine that the extension runs on; in a remote window that is the remote one. */
export const MACHINE: Machine = {
    platform: process.platform,
    home: os.homedir(),
    env: process.env,
    canRun: (file) => {
        try {
            fs.accessSync(file, fs.constants.X_OK);
            return fs.statSync(file).isFile();
        } catch {
            return false;
        }
    },
    firstLine: (file) => {
        const start = Buffer.alloc(512);
        try {
            const opened = fs.openSync(file, "r");
            try {
                const length = fs.readSync(opened, start, 0, start.length, 0);
                return start.toString("latin1", 0, length).split("\n", 1)[0] ?? "";
            } finally {
                fs.closeSync(opened);
            }
        } catch {
            return "";
        }
    },
};

/** How often to look for albor while the person installs it. */
const LOOK_MS = 2000;

/** The language server of this window, running or not. */
export class Session implements vscode.Disposable {
    /** What is known now; read by the status bar. */
    phase: Phase = "idle";
    reason = "";
    server: ServerStatus | undefined;
    lastMs: number | undefined;
    paused = false;

    readonly #log: vscode.LogOutputChannel;
    readonly #changed = new vscode.EventEmitter<void>();
    readonly #backoff = new Backoff();
    #run: Run | undefined;
    #retry: NodeJS.Timeout | undefined;
    #looking: NodeJS.Timeout | undefined;
    /** Starts and stops happen one after the other. */
    #queue: Promise<void> = Promise.resolve();

    constructor(log: vscode.LogOutputChannel) {
        this.#log = log;
    }

    /** Fires when anything that the status bar shows has changed. */
    get onChange(): vscode.Event<void> {
        return this.#changed.event;
    }

    /** Start the language server unless it runs already or is on its way. */
    async start(): Promise<void> {
        await this.#enqueue(async () => {
            if (this.#run === undefined) {
                await this.#start();
            }
        });
    }

    /** End the language server and start it anew. */
    async restart(): Promise<void> {
        this.#backoff.reset();
        await this.#enqueue(async () => {
            await this.#stop();
            await this.#start();
        });
    }

    /** End the language server; when this returns its process has been told to go. */
    async stop(): Promise<void> {
        this.stopLooking();
        await this.#enqueue(() => this.#stop());
    }

    /** Look for albor every two seconds, as it is being installed, and start when it is there. */
    lookForProgram(): void {
        this.#looking ??= setInterval(() => {
            if ("program" in find(programPath(), MACHINE)) {
                this.stopLooking();
                void this.start();
            }
        }, LOOK_MS);
    }

    /** Stop looking. */
    stopLooking(): void {
        clearInterval(this.#looking);
        this.#looking = undefined;
    }

    /** Pause or resume suggestions in this window. */
    togglePause(): void {
        this.paused = !this.paused;
        this.#changed.fire();
    }

    /**
     * Have the language server carry out a command.
     *
     * @throws an `Error` with one line for the person when it can't
     */
    async command(command: string): Promise<unknown> {
        const run = this.#run;
        if (run === undefined || this.phase !== "running") {
            throw new Error(this.reason || "the language server has not started yet");
        }
        if (!run.commands.includes(command)) {
            throw new Error(`this version of albor does not know ${command}: install a newer one`);
        }
        return run.command(command);
    }

    /** Tell the language server, if it runs, that a setting changed. */
    async settingsChanged(): Promise<void> {
        if (this.phase === "running") {
            await this.#run?.settingsChanged();
        }
    }

    dispose(): void {
        this.stopLooking();
        clearTimeout(this.#retry);
        this.#changed.dispose();
    }

    async #enqueue(work: () => Promise<void>): Promise<void> {
        const done = this.#queue.then(work);
        this.#queue = done.catch((error: unknown) => {
            this.#log.error(String(error));
        });
        await this.#queue;
    }

    async #start(): Promise<void> {
        clearTimeout(this.#retry);
        const found = find(programPath(), MACHINE);
        if ("reason" in found) {
            if (this.reason !== found.reason) {
                this.#log.warn(found.reason);
            }
            this.#show("missing", found.reason);
            return;
        }
        this.#log.info(`starting ${found.program}`);
        this.server = undefined;
        this.#show("starting");
        const { Run } = await import("./run");
        const began = performance.now();
        let dead = false;
        let ready = false;
        const died = (): void => {
            if (!dead && this.#run === run) {
                dead = true;
                const what = ready
                    ? "the language server ended"
                    : `${found.program} ended before it was ready (the log says why)`;
                void this.#wait(run, performance.now() - began, what);
            }
        };
        const run = new Run(
            found.program,
            vscode.workspace.getConfiguration().get(SECTION),
            this.#log,
            {
                isPaused: () => this.paused,
                onDeath: died,
                onStatus: (status) => {
                    this.server = status;
                    this.#changed.fire();
                },
                onAnswer: (ms, suggested) => {
                    if (suggested) {
                        this.lastMs = ms;
                        this.#changed.fire();
                    }
                },
            },
        );
        this.#run = run;
        try {
            await run.start();
            ready = true;
            if (this.#isCurrent(run)) {
                this.#show("running");
            }
        } catch (error) {
            this.#log.error(error instanceof Error ? error.message : String(error));
            died();
        }
    }

    #isCurrent(run: Run): boolean {
        return this.#run === run;
    }

    /** After a death: wait, longer each time, and start again. */
    async #wait(run: Run, ranMs: number, what: string): Promise<void> {
        const pauseMs = this.#backoff.died(ranMs);
        this.#run = undefined;
        this.server = undefined;
        this.#show("waiting", `${what}; it starts again in ${pauseMs / 1000} s`);
        this.#retry = setTimeout(() => void this.start(), pauseMs);
        await run.stop();
    }

    async #stop(): Promise<void> {
        clearTimeout(this.#retry);
        const run = this.#run;
        this.#run = undefined;
        this.server = undefined;
        this.#show("idle");
        await run?.stop();
    }

    #show(phase: Phase, reason = ""): void {
        this.phase = phase;
        this.reason = reason;
        void vscode.commands.executeCommand("setContext", "albor.installed", phase === "running");
        this.#changed.fire();
    }
}
