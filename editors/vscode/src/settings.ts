// The settings that the extension itself reads; all others go to the language server as they are.

import * as vscode from "vscode";

import { decide, flipped, type Values } from "./decide";

/** Every setting's name starts with this. */
export const SECTION = "albor";

/** Settings that only the extension knows; the language server never sees them. */
export const OWN: readonly string[] = ["enabled", "automatic", "path"];

/** A document larger than this, in UTF-16 units, is neither sent nor completed. */
export const MAX_DOCUMENT_LEN = 4_000_000;

/** The documents that get suggestions: files, also unsaved ones, and notebook cells. */
export const SCHEMES: readonly string[] = ["file", "untitled", "vscode-notebook-cell"];

/** The value of `albor.path`. */
export function programPath(): string {
    return vscode.workspace.getConfiguration(SECTION).get("path", "");
}

/** Whether suggestions are on for the document, by its language, folder and workspace. */
export function isEnabled(document: vscode.TextDocument): boolean {
    return decide(enabledValues(document));
}

/** Places in `Values`, narrowest first. */
const WORKSPACE = 1;
const PERSON = 2;

/** What was set for a document, for a language (`{ languageId }`), or for none (undefined). */
function enabledValues(scope: vscode.ConfigurationScope | undefined): Values {
    const said = vscode.workspace.getConfiguration(SECTION, scope).inspect<boolean>("enabled");
    return {
        places: [
            { plain: said?.workspaceFolderValue, language: said?.workspaceFolderLanguageValue },
            { plain: said?.workspaceValue, language: said?.workspaceLanguageValue },
            { plain: said?.globalValue, language: said?.globalLanguageValue },
        ],
        byDefault: said?.defaultLanguageValue ?? said?.defaultValue ?? true,
    };
}

/** Whether suggestions come by themselves, not only when asked for. */
export function isAutomatic(document: vscode.TextDocument): boolean {
    return vscode.workspace.getConfiguration(SECTION, document).get("automatic", true);
}

/** Why a document gets no suggestions, in one line; empty when it does. */
export function offReason(document: vscode.TextDocument | undefined): string {
    if (document === undefined) {
        return "";
    }
    if (!SCHEMES.includes(document.uri.scheme)) {
        return "no suggestions in this kind of document";
    }
    if (!isEnabled(document)) {
        return `off for ${document.languageId} here`;
    }
    return isTooLarge(document) ? "off: this file is larger than 4 million characters" : "";
}

const sizes = new WeakMap<vscode.TextDocument, { version: number; large: boolean }>();

/** How many versions a document's size is trusted for; measuring costs a copy of the text. */
const SIZE_VERSIONS = 1000;

/** Whether a document is over the limit. */
export function isTooLarge(document: vscode.TextDocument): boolean {
    const known = sizes.get(document);
    if (known !== undefined && document.version - known.version < SIZE_VERSIONS) {
        return known.large;
    }
    const large = document.getText().length > MAX_DOCUMENT_LEN;
    sizes.set(document, { version: document.version, large });
    return large;
}

/** What the language server is told: the section without the extension's own settings. */
export function forServer(section: unknown): unknown {
    if (typeof section !== "object" || section === null) {
        return section;
    }
    return Object.fromEntries(Object.entries(section).filter(([name]) => !OWN.includes(name)));
}

/** Turn suggestions on or off for the person, everywhere. */
export async function toggleEverywhere(): Promise<void> {
    const { places, byDefault } = enabledValues(undefined);
    const value = flipped({ places: places.slice(PERSON), byDefault }, 0, "plain");
    await vscode.workspace
        .getConfiguration(SECTION)
        .update("enabled", value, vscode.ConfigurationTarget.Global);
}

/** Turn suggestions on or off in the open workspace. */
export async function toggleWorkspace(): Promise<void> {
    const value = flipped(enabledValues(undefined), WORKSPACE, "plain");
    await vscode.workspace
        .getConfiguration(SECTION)
        .update("enabled", value, vscode.ConfigurationTarget.Workspace);
}

/** Turn suggestions on or off for a language, everywhere. */
export async function toggleLanguage(languageId: string): Promise<void> {
    const value = flipped(enabledValues({ languageId }), PERSON, "language");
    await vscode.workspace
        .getConfiguration(SECTION, { languageId })
        .update("enabled", value, vscode.ConfigurationTarget.Global, true);
}
