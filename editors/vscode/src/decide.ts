// Whether suggestions are on, from the values that a person has set in several places.

/** What one place (the person's settings, the workspace's, a folder's) says. */
export interface Place {
    /** For every language; undefined when it says nothing. */
    readonly plain: boolean | undefined;
    /** For the document's language; undefined when it says nothing. */
    readonly language: boolean | undefined;
}

/** All places, the narrowest first, and what holds when none says anything. */
export interface Values {
    readonly places: readonly Place[];
    readonly byDefault: boolean;
}

/**
 * Whether suggestions are on.
 *
 * The narrowest place decides, and in one place the language before the rest. A plain "on" undoes
 * a wider plain "off", but turns no language on that is off by default, as Markdown is. (The
 * editor's own merging lets a language's value in the person's settings win over the workspace's
 * plain one, so that "off in this workspace" would leave some languages on.)
 */
export function decide(values: Values): boolean {
    let undone = false;
    for (const place of values.places) {
        if (place.language !== undefined) {
            return place.language;
        }
        if (place.plain === false && !undone) {
            return false;
        }
        undone ||= place.plain === true;
    }
    return values.byDefault;
}

/**
 * What to write so that suggestions change in one place: nothing (undefined) where that is enough,
 * so that settings files stay short.
 *
 * @param index - of the place to write to
 * @param what - which of the place's two values to write
 */
export function flipped(
    values: Values,
    index: number,
    what: "plain" | "language",
): boolean | undefined {
    const wanted = !decide(values);
    const without = values.places.map((place, at) =>
        at === index ? { ...place, [what]: undefined } : place,
    );
    return decide({ ...values, places: without }) === wanted ? undefined : wanted;
}
