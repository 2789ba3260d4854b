"""Why a mutant survives, by its name: "equivalent: ..." where no caller can see a difference, "gap: ..." where a test is missing."""

WHY: dict[str, str] = {
    "slots/assign_slots/2": "equivalent: an index of tokens that are all stored has no -1, so the bound at 0 changes nothing",
    "recycle/expire/0": "equivalent: leaves early where there is nothing to look at, which the rest finds out too",
    "recycle/drop/2": "equivalent: on a CPU it is asked whether anything goes at all; the rest of the function does nothing then",
    "recycle/_unshare_open_pages/5": "equivalent: a page with one user has one writer and no reader, so it is no copy before this line",
    "chunk/finish/2": "equivalent: the same attention by a mask where the order alone would do",
    "chunk/finish/6": "equivalent: a window as long as the chunk hides nothing",
    "writer/stores all shards": "gap: the one-rank tests can't see it; the tests of several ranks and the model checker were not run on it",
    "writer/late of any layer": "gap: as above",
    "writer/expired counted everywhere": "gap: as above",
    "writer/appended counted everywhere": "gap: as above",
    "writer/spilled here": "gap: as above",
    "recycle/summary not copied": "gap: no narrow test reads a summary after a shared page was copied; not run against the model checker",
    "table/PageTable.join/1": "gap: no narrow test parks the widest row",
    "recycle/_fork_tail/4": "gap: no example cuts a row whose group was encoded by its very last entry",
    "recycle/_fork_tail/9": "gap: not one of the examples has an encoded group in a later table of a later row",
    "sizing/held_pages/9": "gap: the cases by hand have no row whose empty slots differ by it",
}
