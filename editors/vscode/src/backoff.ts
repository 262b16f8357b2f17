// How long to wait before the language server is started again.

/** Milliseconds before the first new start. */
const FIRST_MS = 500;
/** The longest pause. */
const LONGEST_MS = 30_000;
/** A server that ran this long was healthy: its death starts the counting anew. */
const HEALTHY_MS = 60_000;

/** Counts deaths and says how long to wait: 0.5 s, doubled with each, at most 30 s. */
export class Backoff {
    #deaths = 0;

    /**
     * Note that the server died.
     *
     * @param ranMs - how long it had run
     * @returns milliseconds to wait before the next start
     */
    died(ranMs: number): number {
        this.#deaths = ranMs >= HEALTHY_MS ? 1 : this.#deaths + 1;
        return Math.min(FIRST_MS * 2 ** (this.#deaths - 1), LONGEST_MS);
    }

    /** Forget the deaths: the person asked for a start. */
    reset(): void {
        this.#deaths = 0;
    }
}
