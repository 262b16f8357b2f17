// Read-only pages: the explanation of a suggestion, and the statistics.

import * as vscode from "vscode";

const SCHEME = "albor";

/** Shows texts of the language server as read-only documents. */
export class Pages implements vscode.TextDocumentContentProvider, vscode.Disposable {
    readonly #texts = new Map<string, string>();
    readonly #changed = new vscode.EventEmitter<vscode.Uri>();
    readonly #registration: vscode.Disposable;

    constructor() {
        this.#registration = vscode.workspace.registerTextDocumentContentProvider(SCHEME, this);
    }

    get onDidChange(): vscode.Event<vscode.Uri> {
        return this.#changed.event;
    }

    provideTextDocumentContent(uri: vscode.Uri): string {
        return this.#texts.get(uri.path) ?? "";
    }

    /** Open the page `name`, or bring it up to date where it is open. */
    async show(name: string, content: unknown): Promise<void> {
        const uri = vscode.Uri.from({ scheme: SCHEME, path: `/${name}.md` });
        this.#texts.set(uri.path, asText(content));
        this.#changed.fire(uri);
        const document = await vscode.workspace.openTextDocument(uri);
        await vscode.window.showTextDocument(document, {
            preview: true,
            viewColumn: vscode.ViewColumn.Beside,
            preserveFocus: true,
        });
    }

    dispose(): void {
        this.#registration.dispose();
        this.#changed.dispose();
    }
}

/** A text as it is; anything else as indented JSON in a fence. */
export function asText(content: unknown): string {
    if (typeof content === "string") {
        return content;
    }
    if (content === null || content === undefined) {
        return "Nothing yet: type until a suggestion is shown.\n";
    }
    return `\`\`\`json\n${JSON.stringify(content, undefined, 2)}\n\`\`\`\n`;
}
