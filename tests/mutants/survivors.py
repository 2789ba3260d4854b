"""Why a mutant survives, by its name: "equivalent: ..." where no caller can see a difference, "gap: ..." where a test is missing."""

WHY: dict[str, str] = {
    "sdpa_lse/window wider than the keys": "gap: of the narrow tests none has a window of one token less than the keys; not yet run against the "
    "model checker",
}
