"""Makes the tokenizer of the demo: byte-level BPE on a small grammar of ball-game commentary.

    python -m svlm_jax.demo.make_tokenizer              writes svlm_jax/demo/tiny/tokenizer.json, in under a second

It speaks every byte, has the special tokens and the pieces of Qwen2.5-VL (digits one by one, " ..." one token), and is the
same file whenever it is made. Its ids are the rows of the demo checkpoint's embedding: remake one, retrain the other.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, models, pre_tokenizers, trainers

from svlm_jax.tokenizer import byte_level

TINY = Path(__file__).parent / "tiny"
VOCABULARY = 1_280  # entries at most, special tokens included
SPECIAL_TOKENS = (  # the names of Qwen2.5-VL, in its order
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)

# What every prompt says, besides the commentary. Each line stands alone, so the last piece of it is what is learnt.
STRUCTURE = (
    *("system\n", "user\n", "assistant\n", "previous text\n", " system", "Time=12.0-13.0s", "\n", "\n\n", " ..."),
    *("You are a helpful assistant.", "Commentate on this match", "A match between two teams."),
)

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
GOALS = ("nil", *NUMBERS[:6])
WORDS = {
    "colour": COLOURS,
    "other": COLOURS,
    "player": tuple(str(number) for number in range(1, 12)),
    "mate": tuple(str(number) for number in range(1, 12)),
    "name": NUMBERS,
    "goals": GOALS,
    "more": GOALS,
    "score": tuple(str(number) for number in range(7)),
    "against": tuple(str(number) for number in range(7)),
    "minute": tuple(str(number) for number in range(1, 91)),
    "side": ("left", "right"),
    "wing": ("on the left", "on the right", "through the middle", "down the line", "near the corner", "in midfield", "inside the box"),
    "how": ("quickly", "neatly", "calmly", "hard", "low", "high", "wide", "short", "long", "forward", "back", "square"),
    "shout": ("Oh", "Yes", "Well", "And", "Now", "Look", "What a chance", "What a goal", "Great play", "Nice touch"),
}
# What questions, answers and other recaps may want.
OTHER_WORDS = (
    "saves blocks catches misses loses receives strikes stops waits kicked passed tackled shoots shooting moving attackers",
    "defenders player players keepers half-time referee whistle centre circle top bottom first last third next again slow fast",
    "just only not none nobody they them their his her its you we us do does did can could see seen watch happening happened why",
    "when will would been be being had have get gets got into onto off away behind front ahead level draw lead leads leading wins",
    "zero grass pitch sideline box target save miss attack attacks corner kick-off goalless twelve replay slowly crowd cheers",
    "camera picture video oh look",
)
TEMPLATES = (
    "Kick-off, {colour} against {other}.",
    "The {colour} team kicks off and {colour} {player} has the ball.",
    "We are under way in the second half, {other} with the ball.",
    "{colour} {player} passes {how} to {colour} {mate}.",
    "{colour} {player} plays it {how} to number {mate} {wing}.",
    "The ball goes from {player} to {mate}, {colour} keep it {wing}.",
    "A long pass by {colour} {player}, and {mate} is there.",
    "{colour} {player} runs with the ball {wing}.",
    "{colour} {player} dribbles past {other} {mate}.",
    "{other} {mate} tackles {colour} {player} and wins the ball.",
    "A good tackle by {other} {mate}, {colour} lose it {wing}.",
    "Intercepted by {other} {player}, who moves {how}.",
    "{colour} {player} shoots {how} from the {side}!",
    "{colour} {player} takes a shot, it goes {how} and over the bar.",
    "The shot hits the post, still no goal for {colour}.",
    "Saved by the {other} goalkeeper, a great save!",
    "The {other} keeper holds the ball and throws it out {wing}.",
    "Goal! {colour} {player} scores, {score}-{against}.",
    "It is a goal for {colour}, {name} {player} with the header!",
    "{shout}, {colour} {player} puts it in the net, {goals} {more}.",
    "Foul by {other} {mate} on {colour} {player}, free kick.",
    "The referee shows a yellow card to {other} {mate}, and now a red card.",
    "Throw-in for {colour} on the {side}.",
    "Corner kick for {colour} from the {side}, cleared by {other} {mate}.",
    "Goal kick, {other} start again from the back.",
    "Offside, the flag is up against {colour} {player}.",
    "Penalty for {colour}! {player} steps up against the keeper.",
    "The ball is out of play.",
    "The ball rolls to the {side} side of the field.",
    "The score is {goals} to {more}, {colour} lead {other}.",
    "{colour} {score}, {other} {against} after {minute} minutes.",
    "Half time, {colour} {goals}, {other} {more}.",
    "Full time, the match is over and {colour} win {score} to {against}.",
    "{shout}, {colour} are all over {other} at this moment.",
    "Both teams wait {wing}, it is quiet now.",
    "They press {how} and {other} {player} clears.",
    "Substitution, number {player} comes on for number {mate}.",
    "{colour} {player} turns, crosses from the {side}, {mate} heads it {how}.",
    "{colour} in possession, {other} in defence, the crowd sings.",
    "{shout}, he is still running with the ball at his feet.",
    "Who has the ball? {colour} {player} has the ball.",
    "Who scored? {colour} {player} scored the goal in minute {minute}.",
    "What is the score? It is {score}-{against} for {colour}.",
    "Which team is attacking? The {colour} team is attacking {wing}.",
    "Which colour is winning? {colour} is winning, {goals} to {more}.",
    "How many goals are there? There are {name} goals.",
    "Where is the ball? It is {wing}.",
    "Was that a foul? No, it was a fair tackle by {other} {mate}. Yes, it was.",
)


def sentences(rounds: int = 12) -> Iterator[str]:
    """Every template filled `rounds` times with words that a fixed seed picks, as they stand in a caption and in a question."""
    source = random.Random(0)
    for template in TEMPLATES * rounds:
        picked = {slot: words[int(source.random() * len(words))] for slot, words in WORDS.items()}
        if picked["other"] == picked["colour"]:
            picked["other"] = COLOURS[COLOURS.index(picked["colour"]) - 1]
        filled = template.format_map(picked)
        yield " " + filled[0].lower() + filled[1:]  # a caption's words each follow a space
        yield filled[0].upper() + filled[1:]


def corpus() -> list[str]:
    """What the merges are counted on. Each colour, number and piece of structure is there often enough to be one token."""
    single = [" " + word for words in (*WORDS.values(), OTHER_WORDS) for text in words for word in text.split()]
    named = [form for word in (*COLOURS, "goal", "foul", "save") for form in (word.capitalize(), " " + word.capitalize())]
    return [*STRUCTURE * 40, *single * 3, *named * 3, *sentences()]


def make(lines: list[str] | None = None, vocabulary: int = VOCABULARY):
    """The `tokenizers.Tokenizer`: 256 bytes, then merges in order of frequency in `lines`, then the special tokens."""
    inner = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        min_frequency=3,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(corpus() if lines is None else lines, trainer)
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    return inner


def companion(inner) -> dict:
    """`tokenizer_config.json`, by which transformers and vLLM load the same tokenizer."""
    added = {
        str(id): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for id, token in sorted(inner.get_added_tokens_decoder().items())
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }


def write(inner, folder: Path) -> None:
    """The tokenizer's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(companion(inner), indent=2) + "\n", encoding="utf-8")
    print(f"{folder / 'tokenizer.json'}: {inner.get_vocab_size()} tokens", file=sys.stderr)


def main(folder: Path = TINY) -> None:
    write(make(), folder)


if __name__ == "__main__":
    main()
