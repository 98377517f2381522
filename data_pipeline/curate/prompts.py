"""The five rephrasing tasks of Nemotron-CC (arXiv 2412.02595, section 2.3 and appendix H) and which text gets which.

The prompts say in our words what the paper's ask for; the fixed opening lines are the paper's, since a reply is known
by them. Lengths are those of NVIDIA's public recipe (NVIDIA-NeMo/Curator, `tutorials/synthetic/nemotron_cc`). Text of
medium quality is left as it is, as in the paper (table 3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from data_pipeline.config import Label

# The recipe counts tokens of the model that rephrases. Its tokenizer is not at hand behind a URL, so tokens are taken
# as this many UTF-8 bytes each: right for English within a tenth; code and other scripts have more tokens than that.
BYTES_PER_TOKEN = 4


def tokens(text: str) -> int:
    """Estimated tokens of `text`: its UTF-8 bytes / BYTES_PER_TOKEN, rounded up."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


@dataclass(frozen=True)
class Task:
    """One way of rephrasing. Lengths are in tokens, as `tokens` counts them."""

    name: str
    prompt: str                 # `{text}` stands for the input
    longest_input: int          # prompt and text
    longest_reply: int
    shortest_document: int      # shorter documents are not asked about
    shortest_segment: int       # nor are shorter pieces of a document
    shortest_result: int        # shorter results are dropped
    system: str = ""
    opening: str = ""           # a reply starts with this line, or is dropped
    joined: bool = False        # the results of a document's segments become one document

    @property
    def longest_segment(self) -> int:
        """Tokens of text that fit beside the prompt; 2 are left for the separators of a chat template."""
        return self.longest_input - tokens(self.system + self.prompt.format(text="")) - 2

    @property
    def version(self) -> str:
        """Changes with the wording."""
        return hashlib.sha256(f"{self.system}\0{self.prompt}".encode()).hexdigest()[:12]

    def messages(self, text: str) -> list[dict[str, str]]:
        """The conversation to complete, as /chat/completions takes it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt.format(text=text)}]


WIKIPEDIA = Task(
    name="wikipedia",
    system="You are an assistant who answers questions in a helpful, thorough and polite way.",
    prompt="""\
Write the text below anew in good English, in other words, with the sentences an encyclopaedia such as Wikipedia \
would use. The first line of your answer must read "Here is a paraphrased version:".

Text: {text}""",
    longest_input=512, longest_reply=512, shortest_document=5, shortest_segment=5, shortest_result=50,
    opening="Here is a paraphrased version:",
    joined=True,
)
DIVERSE_QA = Task(
    name="diverse_qa",
    prompt="""\
Read the text below, then ask up to 8 questions about it and answer them.

- Let the questions differ in what they cover and in what it takes to answer them. Mix these kinds: yes/no; open \
(what, how, when, where, why, who); multiple choice, with the choices in the question; comparison of two things or \
quantities; reading comprehension; problems to solve by logic, arithmetic or science.
- Ask for facts, for knowledge that matters and for concrete details of the text. Every answer must be right.
- Be clear and brief. Write plain text, no Markdown.
- Put each question with its answer on one line, as in this pattern:

Here are the questions and answers based on the provided text:
- Question: [first question] Answer: [first answer]
- Question: [second question] Answer: [second answer]

Text:
{text}

Now give the questions and answers in that pattern.""",
    longest_input=1000, longest_reply=600, shortest_document=30, shortest_segment=30, shortest_result=100,
)
DISTILL = Task(
    name="distill",
    system="You are an assistant whose answers are accurate, considered and well reasoned.",
    prompt="""\
Condense the text below into a clear, readable version of itself.

- It is to be shorter but no mere summary: keep every fact, figure and concept that matters.
- Keep technical terms, examples, evidence and the steps of an argument.
- Add nothing that the text does not say.
- Write plain text without formatting.

Text:
{text}

Now write the condensed version in good English. Start your answer with "Paraphrased Text:".""",
    longest_input=2000, longest_reply=1600, shortest_document=30, shortest_segment=10, shortest_result=50,
    opening="Paraphrased Text:",
)
EXTRACT_KNOWLEDGE = Task(
    name="extract_knowledge",
    prompt="""\
Restate the knowledge in the text below as one or more passages, in the plain, good English of a textbook or an \
encyclopaedia.

- Keep what belongs to a field of learning or work: science, engineering, mathematics, medicine, law, business, \
education, history, politics, society, the arts and their like. Leave out whatever teaches nothing.
- Keep examples, evidence and the steps of an argument.
- Change no detail and add none.
- Write plain text without titles, notes or comments.

Text:
{text}

Now write the passage or passages.""",
    longest_input=1400, longest_reply=1400, shortest_document=30, shortest_segment=30, shortest_result=50,
)
KNOWLEDGE_LIST = Task(
    name="knowledge_list",
    prompt="""\
List what there is to learn from the text below: facts, concrete details, key concepts, numbers and statistics.

- One point a line, each starting with "- ", each clear, specific and borne out by the text.
- Say much in few words. No titles or headings.

Text:
{text}

Now give the list.""",
    longest_input=1000, longest_reply=600, shortest_document=30, shortest_segment=30, shortest_result=50,
)

TASKS: Mapping[str, Task] = {
    task.name: task for task in (WIKIPEDIA, DIVERSE_QA, DISTILL, EXTRACT_KNOWLEDGE, KNOWLEDGE_LIST)
}
# Low quality is written anew to lose noise and errors, high quality in every way to gain tokens (table 3).
TASKS_OF_LABEL: Mapping[Label, tuple[Task, ...]] = {
    "high": tuple(TASKS.values()),
    "medium-high": tuple(TASKS.values()),
    "medium": (),
    "medium-low": (WIKIPEDIA,),
    "low": (WIKIPEDIA,),
}
