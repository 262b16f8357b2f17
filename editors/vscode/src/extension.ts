// Where the editor comes in and goes out.

import * as vscode from "vscode";

import { ways } from "./installer";
import { Pages } from "./pages";
import { MACHINE, Session } from "./session";
import { offReason, SECTION, toggleEverywhere, toggleLanguage, toggleWorkspace } from "./settings";
import { showMenu, StatusBar } from "./statusbar";

/** Set once the walkthrough was shown on this machine. */
const WELCOMED = "welcomed";

let session: Session | undefined;

/** Called by the editor once its window is up; the language server starts with the first file. */
export function activate(context: vscode.ExtensionContext): void {
    const log = vscode.window.createOutputChannel("albor", { log: true });
    const current = new Session(log);
    session = current;
    const pages = new Pages();
    const commands: Readonly<Record<string, (...args: unknown[]) => unknown>> = {
        "albor.menu": () => showMenu(current),
        "albor.trigger": async () => {
            await current.start();
            await vscode.commands.executeCommand("editor.action.inlineSuggest.trigger");
        },
        "albor.acceptWord": () =>
            vscode.commands.executeCommand("editor.action.inlineSuggest.acceptNextWord"),
        "albor.acceptLine": () =>
            vscode.commands.executeCommand("editor.action.inlineSuggest.acceptNextLine"),
        "albor.toggle": toggleEverywhere,
        "albor.toggleLanguage": async () => {
            const language = vscode.window.activeTextEditor?.document.languageId;
            if (language === undefined) {
                hint("albor: open a file of the language first");
            } else {
                await toggleLanguage(language);
            }
        },
        "albor.toggleWorkspace": async () => {
            if ((vscode.workspace.workspaceFolders ?? []).length === 0) {
                hint("albor: no workspace is open");
            } else {
                await toggleWorkspace();
            }
        },
        "albor.togglePause": () => {
            current.togglePause();
        },
        "albor.restartServer": () => current.restart(),
        "albor.openLog": () => {
            log.show(true);
        },
        "albor.explainSuggestion": () => showPage(current, pages, "explanation", "albor.explain"),
        "albor.showStatistics": () => showPage(current, pages, "statistics", "albor.stats"),
        "albor.install": () => install(current),
        "albor.example": () => openExample(),
        "albor.openWalkthrough": () => openWalkthrough(context),
    };
    context.subscriptions.push(
        log,
        current,
        pages,
        new StatusBar(current),
        ...Object.entries(commands).map(([name, run]) =>
            vscode.commands.registerCommand(name, run),
        ),
        vscode.workspace.onDidOpenTextDocument((document) => {
            startFor(current, [document]);
        }),
        vscode.workspace.onDidChangeConfiguration((event) => {
            if (event.affectsConfiguration(`${SECTION}.path`)) {
                void current.restart();
            } else if (event.affectsConfiguration(SECTION)) {
                void current.settingsChanged();
                startFor(current, vscode.workspace.textDocuments);
            }
        }),
        vscode.window.onDidChangeWindowState((state) => {
            // The person may come back from a terminal in which albor was just installed.
            if (state.focused && current.phase === "missing") {
                void current.start();
            }
        }),
    );
    startFor(current, vscode.workspace.textDocuments);
    // Once, and not over a file that somebody has begun to type in.
    const idle = vscode.window.activeTextEditor === undefined;
    if (idle && context.globalState.get<boolean>(WELCOMED) !== true) {
        void context.globalState.update(WELCOMED, true);
        void openWalkthrough(context);
    }
}

/** Called by the editor before it goes. */
export async function deactivate(): Promise<void> {
    await session?.stop();
}

/** Start the language server once there is a document that it is for. */
function startFor(current: Session, documents: readonly vscode.TextDocument[]): void {
    const stopped = current.phase === "idle" || current.phase === "missing";
    if (stopped && documents.some((document) => offReason(document) === "")) {
        void current.start();
    }
}

async function openWalkthrough(context: vscode.ExtensionContext): Promise<void> {
    await vscode.commands.executeCommand(
        "workbench.action.openWalkthrough",
        `${context.extension.id}#start`,
        false,
    );
}

/** A file to try albor in: unsaved, with something to go on. */
async function openExample(): Promise<void> {
    const content = "def is_leap_year(year):\n    ";
    const document = await vscode.workspace.openTextDocument({ language: "python", content });
    const editor = await vscode.window.showTextDocument(document);
    const end = document.positionAt(content.length);
    editor.selection = new vscode.Selection(end, end);
}

async function showPage(
    current: Session,
    pages: Pages,
    name: string,
    command: string,
): Promise<void> {
    try {
        await pages.show(name, await current.command(command));
    } catch (error) {
        hint(`albor: ${error instanceof Error ? error.message : String(error)}`);
    }
}

/** Offer the commands that install albor; nothing runs before the person picks one. */
async function install(current: Session): Promise<void> {
    const choose = "$(folder-opened) Choose albor-lsp on this machine…";
    const items = ways(MACHINE).map((way) => ({
        label: `$(terminal) ${way.command}`,
        detail: `Runs this in a terminal, with ${way.tool}, where you can watch it.`,
        command: way.command,
    }));
    const picked = await vscode.window.showQuickPick(
        [
            ...items,
            { label: choose, detail: "For an albor that is already installed.", command: "" },
        ],
        { title: "Install albor", placeHolder: "Which command shall run?" },
    );
    if (picked === undefined) {
        return;
    }
    if (picked.command === "") {
        const files = await vscode.window.showOpenDialog({ title: "albor-lsp" });
        const file = files?.[0];
        if (file !== undefined) {
            const settings = vscode.workspace.getConfiguration(SECTION);
            await settings.update("path", file.fsPath, vscode.ConfigurationTarget.Global);
        }
        return;
    }
    const terminal = vscode.window.createTerminal("Install albor");
    terminal.show();
    terminal.sendText(picked.command, true);
    current.lookForProgram();
}

/** A line in the status bar for some seconds; no box. */
function hint(message: string): void {
    vscode.window.setStatusBarMessage(message, 5000);
}
