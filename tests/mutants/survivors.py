"""Why a mutant survives, by its name: "equivalent: ..." where no caller can see a difference, "gap: ..." where a test is missing."""

WHY: dict[str, str] = {
    "slots/assign_slots/2": "equivalent: an index of tokens that are all stored has no -1, so the bound at 0 changes nothing",
    "chunk/finish/2": "equivalent: the same attention by a mask where the order alone would do",
    "chunk/finish/6": "equivalent: a window as long as the chunk hides nothing",
}
