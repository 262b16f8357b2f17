// The item in the status bar and the menu behind it.

import * as vscode from "vscode";

import { offReason } from "./settings";
import type { Session } from "./session";
import { view } from "./view";

/** Keeps a status bar item true to the session and to the document in front. */
export class StatusBar implements vscode.Disposable {
    readonly #session: Session;
    readonly #item: vscode.StatusBarItem;
    readonly #listeners: vscode.Disposable[];

    constructor(session: Session) {
        this.#session = session;
        this.#item = vscode.window.createStatusBarItem(
            "albor.status",
            vscode.StatusBarAlignment.Right,
            100,
        );
        this.#item.name = "albor";
        this.#item.command = "albor.menu";
        this.#listeners = [
            session.onChange(() => {
                this.#draw();
            }),
            vscode.window.onDidChangeActiveTextEditor(() => {
                this.#draw();
            }),
            vscode.workspace.onDidChangeConfiguration((event) => {
                if (event.affectsConfiguration("albor")) {
                    this.#draw();
                }
            }),
        ];
        this.#draw();
        this.#item.show();
    }

    dispose(): void {
        this.#item.dispose();
        for (const listener of this.#listeners) {
            listener.dispose();
        }
    }

    #draw(): void {
        const { phase, reason, server, lastMs, paused } = this.#session;
        const off = offReason(vscode.window.activeTextEditor?.document);
        const seen = view({ phase, reason, server, lastMs, paused, off });
        this.#item.text = seen.text;
        this.#item.tooltip = new vscode.MarkdownString(seen.tooltip, true);
        this.#item.accessibilityInformation = { label: seen.tooltip.replaceAll(/[\\*]/g, "") };
        this.#item.backgroundColor = seen.warning
            ? new vscode.ThemeColor("statusBarItem.warningBackground")
            : undefined;
    }
}

interface Entry extends vscode.QuickPickItem {
    readonly run?: string;
    readonly args?: readonly unknown[];
}

/** Show the menu; what is picked is carried out. */
export async function showMenu(session: Session): Promise<void> {
    const language = vscode.window.activeTextEditor?.document.languageId;
    const entries: Entry[] = [];
    if (session.phase === "missing") {
        entries.push({ label: "$(cloud-download) Install albor…", run: "albor.install" });
    }
    entries.push({
        label: session.paused ? "$(debug-start) Resume" : "$(debug-pause) Pause in this window",
        run: "albor.togglePause",
    });
    entries.push({ label: "$(globe) Turn on or off everywhere", run: "albor.toggle" });
    if (language !== undefined) {
        entries.push({
            label: `$(code) Turn on or off for ${language}`,
            run: "albor.toggleLanguage",
        });
    }
    if ((vscode.workspace.workspaceFolders ?? []).length > 0) {
        entries.push({
            label: "$(root-folder) Turn on or off in this workspace",
            run: "albor.toggleWorkspace",
        });
    }
    entries.push(
        { label: "", kind: vscode.QuickPickItemKind.Separator },
        { label: "$(question) Explain the last suggestion", run: "albor.explainSuggestion" },
        { label: "$(graph) Statistics", run: "albor.showStatistics" },
        { label: "$(output) Log", run: "albor.openLog" },
        { label: "$(debug-restart) Restart", run: "albor.restartServer" },
        { label: "", kind: vscode.QuickPickItemKind.Separator },
        {
            label: "$(gear) Settings",
            run: "workbench.action.openSettings",
            args: ["@ext:albor.albor"],
        },
        { label: "$(book) Walkthrough", run: "albor.openWalkthrough" },
    );
    const known = session.reason === "" ? (session.server?.model ?? "") : session.reason;
    const picked = await vscode.window.showQuickPick(entries, {
        title: "albor",
        placeHolder: known === "" ? "What shall albor do?" : known,
    });
    if (picked?.run !== undefined) {
        await vscode.commands.executeCommand(picked.run, ...(picked.args ?? []));
    }
}
