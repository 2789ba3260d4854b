"""Why a mutant survives, by its name: "equivalent: ..." where no caller can see a difference, "gap: ..." where a test is missing."""

WHY: dict[str, str] = {
    "sdpa_lse/softcap without its c": "gap: the narrow tests have no softcap; not yet run against the model checker, which has none either",
    "sdpa_lse/window wider than the keys": "gap: no narrow test has a window of one token less than the keys; not run against the model",
}
