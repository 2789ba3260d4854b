"""Why a mutant survives, by its name: "equivalent: ..." where no caller can see a difference, "gap: ..." where a test is missing."""

WHY: dict[str, str] = {}
