"""Choose which questions are asked about a scene, a pair of scenes, or no picture at all."""

from random import Random

from questions import CHOICE, LANGS, SAY, Dialogue, Turn, absent, alone, ask, tell, word
from scenes import Scene, Thing


def turn(rng: Random, kind: str, scene: Scene, lang: str) -> Turn:
    """One question of that kind about a scene, with its answer."""
    if kind in ("describe", "count", "number"):
        return Turn(kind, ask(rng, kind, lang), tell(kind, scene, lang))
    if kind == "is_there":
        yes = not scene.number and rng.random() < 0.5
        name = rng.choice(scene.things).name if yes else absent(rng, scene)
        return Turn(kind, ask(rng, kind, lang, thing=word(name, lang)), CHOICE[kind][lang][yes])
    known = {"where": "name", "colour": "shape", "shape": "colour"}[kind]
    thing = rng.choice(scene.things if kind == "where" else alone(scene, known))
    words = {"thing" if kind == "where" else known: word(getattr(thing, known), lang)}
    return Turn(kind, ask(rng, kind, lang, **words), tell(kind, scene, lang, thing))


def kinds_of(scene: Scene) -> list[str]:
    """The kinds of question this scene can be asked, the hard ones more often."""
    if scene.number:
        return ["number"] * 5 + ["describe", "colour", "count", "is_there"]
    kinds = ["where"] * 8 + ["is_there"] * 6 + ["describe"] * 4 + ["count"] * 2 + ["number"]
    return kinds + ["colour"] * 4 * bool(alone(scene, "shape")) + ["shape"] * 4 * bool(alone(scene, "colour"))


def referring(rng: Random, scene: Scene, first: Turn, lang: str) -> Turn | None:
    """A second question that only makes sense after the first."""
    if scene.number:
        asked = first.kind == "number"
        return (
            Turn("colour", ask(rng, "it_colour", lang), tell("colour", scene, lang, scene.things[0]))
            if asked
            else None
        )
    if first.kind == "count":
        return Turn("describe", ask(rng, "what", lang), tell("describe", scene, lang))
    others = [t for t in alone(scene, "shape") if word(t.shape, lang) not in first.answer]
    if first.kind == "colour" and others and rng.random() < 0.5:
        other = rng.choice(others)
        question = ask(rng, "and", lang, shape=word(other.shape, lang))
        return Turn("colour", question, tell("colour", scene, lang, other))
    thing = named(scene, first, lang)
    return Turn("where", ask(rng, "it_where", lang), tell("where", scene, lang, thing)) if thing else None


def named(scene: Scene, first: Turn, lang: str) -> Thing | None:
    """The thing "it" stands for after that turn."""
    text = {"is_there": first.question, "colour": first.answer, "shape": first.answer}.get(first.kind, "")
    told = [t for t in scene.things if word(t.colour, lang) in text and word(t.shape, lang) in text]
    return told[0] if told else None


def follow_up(rng: Random, scene: Scene, lang: str) -> Dialogue:
    """Two turns; in most the second one needs the first."""
    first = turn(rng, rng.choice([kind for kind in kinds_of(scene) if kind != "where"]), scene, lang)
    second = referring(rng, scene, first, lang) if rng.random() < 0.7 else None
    return first, second or turn(rng, rng.choice(kinds_of(scene)), scene, lang)


def single(rng: Random, scene: Scene, total: int = 7) -> list[Dialogue]:
    """Questions about one picture, one of them with a second turn."""
    kinds = rng.choices(kinds_of(scene), k=total - 1)
    made: list[Dialogue] = [(turn(rng, kind, scene, rng.choice(LANGS)),) for kind in kinds]
    return [*made, follow_up(rng, scene, rng.choice(LANGS))]


def compare(rng: Random, kind: str, scenes: tuple[Scene, ...], lang: str) -> Turn:
    """One question about two pictures of shapes."""
    if kind == "more":
        totals = [len(scene.things) for scene in scenes]
        winner = 2 if totals[0] == totals[1] else totals.index(max(totals))
        return Turn(kind, ask(rng, kind, lang), CHOICE["more"][lang][winner])
    side = rng.randrange(2)
    names = [{t.name for t in scene.things} for scene in scenes]
    if kind == "which" and (only := sorted(names[side] - names[1 - side])):
        question = ask(rng, kind, lang, thing=word(rng.choice(only), lang))
        return Turn(kind, question, CHOICE["more"][lang][side])
    kind = "count" if kind == "pair_count" else "describe"
    question = ask(rng, f"pair_{kind}", lang, nth=CHOICE["nth"][lang][side])
    return Turn(f"pair_{kind}", question, tell(kind, scenes[side], lang))


def pair(rng: Random, scenes: tuple[Scene, ...], total: int = 7) -> list[Dialogue]:
    """Questions about two pictures, one of them with a second turn."""
    kinds = ["more"] * 3 + ["which"] * 3 + ["pair_count", "pair_describe"]

    def some(turns: int, lang: str) -> Dialogue:
        return tuple(compare(rng, rng.choice(kinds), scenes, lang) for _ in range(turns))

    return [some(2 if n == 0 else 1, rng.choice(LANGS)) for n in range(total)]


def talk(rng: Random, blind: bool) -> Dialogue:
    """Small talk, and without a picture also a question that needs one."""
    lang = rng.choice(LANGS)
    kind = said = rng.choice(["who", "who", "can", "hello", "thanks"])
    if blind and rng.random() >= 0.6:
        kind, said = rng.choice(["describe", "count", "number"]), "blind"
    return (Turn("talk", ask(rng, kind, lang), SAY[said][lang]),)
