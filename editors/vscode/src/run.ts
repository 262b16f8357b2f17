// One run of the language server: the process, the protocol, and nothing that pops up.

import * as vscode from "vscode";
import {
    CloseAction,
    ErrorAction,
    LanguageClient,
    RevealOutputChannelOn,
    type Middleware,
} from "vscode-languageclient/node";

import { readStatus, type ServerStatus } from "./view";
import { forServer, isAutomatic, isTooLarge, offReason, SCHEMES, SECTION } from "./settings";

/** What a run tells its owner. */
export interface Listener {
    /** The language server said how it is. */
    readonly onStatus: (status: ServerStatus) => void;
    /** A question was answered after so many milliseconds; true when there was a suggestion. */
    readonly onAnswer: (ms: number, suggested: boolean) => void;
    /** The process ended without being asked to. */
    readonly onDeath: () => void;
    /** Whether the person paused suggestions. */
    readonly isPaused: () => boolean;
}

/** Says everything in the log; a person who types wants no boxes. */
class QuietClient extends LanguageClient {
    override error(message: string, data?: unknown): void {
        super.error(message, data, false);
    }

    override warn(message: string, data?: unknown): void {
        super.warn(message, data, false);
    }
}

/** A started language server. */
export class Run {
    readonly #client: QuietClient;
    #closing = false;

    /**
     * @param program - full path of `albor-lsp`
     * @param settings - the section `albor` as the editor has it
     */
    constructor(
        program: string,
        settings: unknown,
        log: vscode.LogOutputChannel,
        listener: Listener,
    ) {
        this.#client = new QuietClient(
            SECTION,
            "albor",
            { command: program, args: [] },
            {
                documentSelector: SCHEMES.map((scheme) => ({ scheme })),
                initializationOptions: forServer(settings),
                outputChannel: log,
                revealOutputChannelOn: RevealOutputChannelOn.Never,
                initializationFailedHandler: () => false,
                errorHandler: {
                    error: () => ({ action: ErrorAction.Continue, handled: true }),
                    closed: () => {
                        if (!this.#closing) {
                            listener.onDeath();
                        }
                        const message = "The language server ended.";
                        return { action: CloseAction.DoNotRestart, handled: true, message };
                    },
                },
                middleware: middleware(listener),
            },
        );
        this.#client.onNotification("albor/status", (message: unknown) => {
            listener.onStatus(readStatus(message));
        });
    }

    /**
     * Start the process and shake hands.
     *
     * @throws when the program can't be run or refuses
     */
    async start(): Promise<void> {
        await this.#client.start();
    }

    /** Ask the language server to carry out one of its commands; its answer, whatever it is. */
    async command(command: string, ...args: unknown[]): Promise<unknown> {
        return this.#client.sendRequest("workspace/executeCommand", { command, arguments: args });
    }

    /** Tell the language server that a setting changed; it asks for the new values itself. */
    async settingsChanged(): Promise<void> {
        await this.#client.sendNotification("workspace/didChangeConfiguration", { settings: null });
    }

    /** The commands that the language server says it has. */
    get commands(): readonly string[] {
        return this.#client.initializeResult?.capabilities.executeCommandProvider?.commands ?? [];
    }

    /** End the language server; safe in any state. */
    async stop(): Promise<void> {
        this.#closing = true;
        try {
            await this.#client.dispose();
        } catch {
            // It was not running, or it died while it was asked to end: both are what is wanted.
        }
    }
}

function middleware(listener: Listener): Middleware {
    const synchronized = (document: vscode.TextDocument): boolean => !isTooLarge(document);
    return {
        didOpen: async (document, next) => {
            if (synchronized(document)) {
                await next(document);
            }
        },
        didChange: async (event, next) => {
            if (synchronized(event.document)) {
                await next(event);
            }
        },
        didSave: async (document, next) => {
            if (synchronized(document)) {
                await next(document);
            }
        },
        didClose: async (document, next) => {
            if (synchronized(document)) {
                await next(document);
            }
        },
        provideInlineCompletionItems: async (document, position, context, token, next) => {
            const invoked = context.triggerKind === vscode.InlineCompletionTriggerKind.Invoke;
            if (
                listener.isPaused() ||
                offReason(document) !== "" ||
                !(invoked || isAutomatic(document))
            ) {
                return null;
            }
            const start = performance.now();
            const answer = await next(document, position, context, token);
            const items = Array.isArray(answer) ? answer : (answer?.items ?? []);
            if (!token.isCancellationRequested) {
                listener.onAnswer(performance.now() - start, items.length > 0);
            }
            return answer;
        },
        workspace: {
            configuration: async (params, token, next) => {
                const values: unknown = await next(params, token);
                return Array.isArray(values)
                    ? values.map((value: unknown, index) =>
                          params.items[index]?.section === SECTION ? forServer(value) : value,
                      )
                    : [];
            },
            didChangeConfiguration: async (_sections, next) => {
                // No settings in the notification: the server asks for what it needs, per folder.
                await next([]);
            },
        },
    };
}
