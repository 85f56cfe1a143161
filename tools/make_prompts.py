"""Writes aurora_sgl/demo/prompts.jsonl, the demo's sample traffic, from hand-written pieces.

    python tools/make_prompts.py

The seed is fixed, so the file is the same each time (tests/unit/demo/test_prompts.py holds it to that).
A tenth of each domain is held out: it measures drafters and is never trained on. Prompts about the
same function are held out together.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "aurora_sgl" / "demo" / "prompts.jsonl"
SEED = 20261124
PER_DOMAIN = 140
HELD_OUT = 14  # of each domain

#: Pairs (prompt, what it is about).
Grouped = list[tuple[str, str]]

# -- chat ------------------------------------------------------------------------------------------

CHAT = """
My neighbour plays the drums until midnight. Help me write a friendly note to put under the door.
I have two hours in a city that I do not know, and it rains. What should I do?
Write a toast of five sentences for my sister's wedding. She is a nurse and loves hiking.
What is the difference between weather and climate? Explain it to a ten-year-old.
Give me a packing list for three days of camping in October.
I keep waking up at four in the morning. What could be the reasons, and what can I try?
How do I tell my manager that I have too much work without sounding lazy?
Tell me a short story about a lighthouse keeper who finds a bottle with a map in it.
Why do cats knead blankets with their paws?
Write a polite reply to an invitation that I have to decline because of a dentist appointment.
What are the first five things I should learn to cook, and why those?
Describe a sunrise over the sea for someone who has never seen one.
How does a bicycle stay upright when it is moving?
Plan a birthday party for a six-year-old who likes dinosaurs. Keep it cheap.
What should I look at before I rent a flat?
Explain what inflation is with an example about bread.
Give three pros and three cons of working from home.
I want to start running, but I get out of breath after one minute. Make me a plan for four weeks.
Write a product description for a wooden desk lamp with a green shade.
What makes a good apology?
Explain how vaccines work in plain words.
How do I remove red wine from a white tablecloth?
Write a dialogue between a baker and a customer who cannot decide.
What is compound interest, and why do people call it powerful?
Suggest names for a small bookshop that also sells tea, and say what each name suggests.
How can I remember people's names better?
Write a letter from a house plant to its forgetful owner.
What happens in my body when I am scared?
Summarize the rules of chess so that I can start a first game.
How do I sharpen a kitchen knife with a whetstone?
Which questions should I ask at the end of a job interview?
Explain the phases of the moon.
Write a short speech that thanks volunteers at an animal shelter.
What is the best way to store fresh herbs?
My laptop is slow. List what I can check, from the easiest to the hardest.
Compare trains and planes for a journey of 600 kilometres.
Write a bedtime story about a snail that wants to see the mountains.
How do bees find their way back to the hive?
Give me a week of simple dinners for two people who do not eat meat.
How should I prepare for a power cut of two days?
What did people use before paper was invented?
Describe the taste of a lemon without using the word sour.
How do I teach a puppy to walk on a leash?
Explain what a black hole is and what it is not.
Write an announcement for the stairwell: the water will be off on Tuesday morning.
What can I do with six ripe bananas?
How do noise-cancelling headphones work?
I have an exam in ten days and have read nothing. Make a realistic plan.
Write a message to a friend whom I have not spoken to for a year.
Why is the sea salty, and lakes are mostly not?
"""

ASKS = {
    "explain": "Explain {0} in simple words and give one everyday example.",
    "steps": "Give me clear step-by-step instructions for {0}.",
    "mistakes": "What are the most common mistakes with {0}, and how do I avoid them?",
    "why": "Why does {0} matter? Answer in one short paragraph.",
    "beginner": "I am a beginner. What should I know about {0} before I start?",
    "compare": "List three advantages and three disadvantages of {0}.",
    "history": "Tell me briefly how {0} came to be.",
    "poem": "Write a short poem about {0}.",
}
TOPICS = {
    "explain": (
        "photosynthesis|gravity|supply and demand|how a battery stores energy|the water cycle|"
        "what an algorithm is|plate tectonics|how soap cleans|the placebo effect|echoes|"
        "why bread rises|how a search engine finds pages|static electricity|the greenhouse effect"
    ),
    "steps": (
        "repotting a large plant|changing a bicycle tube|making a budget for a month|ironing a shirt|"
        "writing a complaint to a shop|cleaning a coffee machine|building a small bookshelf|"
        "making vegetable soup|setting up a home office|folding a paper boat|"
        "hanging a picture on a brick wall|planting tomatoes on a balcony|baking a plain loaf of bread"
    ),
    "mistakes": (
        "boiling eggs|first-time investing|growing basil indoors|public speaking|painting a room|"
        "learning vocabulary|packing a suitcase|writing a CV|taking photos at night|house training a dog"
    ),
    "why": (
        "sleep|a strong password|a good breakfast|learning history|stretching after sport|"
        "regular backups|biodiversity|reading to children|drinking enough water|fair voting rules"
    ),
    "beginner": (
        "playing the guitar|bird watching|sourdough baking|indoor climbing|keeping bees|chess openings|"
        "watercolour painting|buying a used car|swimming in open water|astronomy with binoculars|"
        "knitting a scarf|keeping an aquarium"
    ),
    "compare": (
        "electric cars|living in a small town|a four-day working week|paper books|online courses|"
        "owning a dog|solar panels on a roof|tap water|renting instead of buying a home|night trains"
    ),
    "history": (
        "the pencil|the bicycle|tea drinking in England|the calendar|zero as a number|the umbrella|"
        "pizza|the lighthouse|the postage stamp|traffic lights|chocolate bars"
    ),
    "poem": (
        "an old bridge|the last train home|a garden in November|a lost glove|morning coffee|"
        "the first snow|a busy market|an empty playground|the smell of rain|a patient teacher"
    ),
}


def chat_prompts(draw: random.Random) -> Grouped:
    written = CHAT.strip().splitlines()
    combined = [
        ASKS[ask].format(topic) for ask, topics in TOPICS.items() for topic in topics.split("|")
    ]
    draw.shuffle(combined)
    prompts = [*written, *combined[: PER_DOMAIN - len(written)]]
    draw.shuffle(prompts)
    return [(prompt, prompt) for prompt in prompts]


# -- code ------------------------------------------------------------------------------------------

FUNCTIONS = """
is_palindrome(text: str) -> bool|returns whether a text reads the same backwards, ignoring case and spaces
word_counts(text: str) -> dict[str, int]|counts how often each word occurs
flatten(rows: list[list[int]]) -> list[int]|joins a list of lists into one list
primes_below(n: int) -> list[int]|returns all primes below n with a sieve
gcd(a: int, b: int) -> int|returns the greatest common divisor without the math module
celsius_to_fahrenheit(value: float) -> float|converts a temperature and rounds it to one digit
merge_sorted(a: list[int], b: list[int]) -> list[int]|merges two sorted lists in linear time
chunks(items: list[str], size: int) -> list[list[str]]|cuts a list into parts of a given size
roman_to_int(numeral: str) -> int|converts a Roman numeral
median(values: list[float]) -> float|returns the median and raises ValueError for an empty list
binary_search(items: list[int], target: int) -> int|returns the index of a value or -1
caesar(text: str, shift: int) -> str|shifts letters by a number of places and keeps the rest
unique(items: list[str]) -> list[str]|removes duplicates and keeps the order
transpose(matrix: list[list[float]]) -> list[list[float]]|swaps rows and columns
fibonacci(n: int) -> list[int]|returns the first n Fibonacci numbers
is_leap_year(year: int) -> bool|applies the Gregorian rule
parse_query(url: str) -> dict[str, str]|returns the query parameters of a URL
read_csv(path: str) -> list[dict[str, str]]|reads a CSV file with a header row
title_case(text: str) -> str|capitalizes each word but not 'and', 'of' and 'the'
running_mean(values: list[float], window: int) -> list[float]|averages over a sliding window
anagrams(words: list[str]) -> list[list[str]]|groups words that are anagrams of each other
balanced(text: str) -> bool|checks that brackets of three kinds are balanced
days_between(first: str, second: str) -> int|counts the days between two ISO dates
digits_sum(n: int) -> int|adds the decimal digits of a number
rotate(items: list[int], k: int) -> list[int]|rotates a list to the right
hamming(a: str, b: str) -> int|counts the positions where two strings differ
invert(mapping: dict[str, str]) -> dict[str, list[str]]|swaps keys and values
longest_word(text: str) -> str|returns the longest word, the first one on a tie
clamp(value: float, low: float, high: float) -> float|keeps a value inside a range
mask_email(address: str) -> str|hides all but the first letter before the @
human_size(count: int) -> str|formats a number of bytes as KB, MB or GB
retry(call, attempts: int)|calls a function again after an exception, at most so many times
moving_max(values: list[int], size: int) -> list[int]|returns the maximum of each window
matrix_multiply(a: list[list[int]], b: list[list[int]]) -> list[list[int]]|multiplies two matrices
run_length(text: str) -> list[tuple[str, int]]|encodes runs of equal letters
vowel_count(text: str) -> int|counts the vowels in a text
nth_root(value: float, n: int) -> float|finds a root by bisection
camel_to_snake(name: str) -> str|turns camelCase into snake_case
histogram(values: list[int]) -> dict[int, int]|counts how often each value occurs
valid_ipv4(address: str) -> bool|checks an IPv4 address without imports
"""
ASK_FUNCTION = (
    "Write a Python function `{0}` that {1}. Add a docstring.",
    "Implement `{0}` in Python. It {1}. Show one example call.",
    "Write pytest tests for a Python function `{0}` that {1}.",
)

CODE = """
Write a Python class `Stack` with push, pop, peek and __len__.
Write a Python class `BankAccount` with deposit and withdraw that refuses overdrafts.
Write a Python context manager that measures how long a block takes.
Write a Python decorator `cached` that remembers results by arguments.
Write a Python generator that yields the lines of a file without their newlines.
Write a Python dataclass `Point` with a method for the distance to another point.
Write a JavaScript function that debounces another function.
Write a JavaScript function that groups an array of objects by a key.
Write a Bash script that renames all .jpeg files in a folder to .jpg.
Write a Bash loop that prints the size of each file given as an argument.
Write an SQL query that returns the three customers with the highest total of orders.
Write SQL that creates tables for books, authors and loans with foreign keys.
Write an HTML page with a form for a name and an e-mail address.
Write CSS that centers a card in the middle of the page.
Write a Go function that reverses a slice of integers in place.
Write a C function that copies a string into a buffer of limited size.
Write a Rust function that returns the largest number in a slice, or None.
Write a regular expression for dates like 2024-03-09 and explain each part.
Write a Dockerfile for a small Flask application.
Write a Makefile with targets build, test and clean for a C program.
Explain what this Python line does: `squares = {n: n * n for n in range(10) if n % 2}`
Explain what this Python line does: `total = sum(float(row[2]) for row in rows[1:])`
Explain what this Python line does: `pairs = list(zip(names, ages, strict=True))`
Explain the difference between a list and a tuple in Python with a short code example.
Explain recursion in Python with a function that computes a factorial.
Find the bug: `def mean(xs): return sum(xs) / len(xs) - 1`
Find the bug: `for i in range(len(items)): if items[i] < 0: items.remove(items[i])`
Find the bug: `def add(item, basket=[]): basket.append(item); return basket`
Rewrite this loop as a list comprehension: `out = []\\nfor w in words:\\n    if len(w) > 3:\\n        out.append(w.upper())`
Write a Python script with argparse that takes a file name and a --verbose flag.
Write a Python function that downloads a URL with urllib and saves it to a file.
Write a Python program that plays rock, paper, scissors against the user.
Write a Python class `Queue` that is built from two stacks.
Write a Python function that prints a multiplication table up to n.
Write a Python class `Matrix` that supports + and * with other matrices.
Write a Python function that walks a folder and returns the ten largest files.
Write a TypeScript interface for a user and a function that formats the full name.
Write a Python linked list with append, remove and iteration.
Write a Java class `Counter` with increment, decrement and reset.
Write a Python function that validates a password and returns a list of problems.
"""


def code_prompts(draw: random.Random) -> Grouped:
    written = [line.replace("\\n", "\n") for line in CODE.strip().splitlines()]
    functions = [line.split("|", 1) for line in FUNCTIONS.strip().splitlines()]
    combined = [(ask.format(*each), each[0]) for each in functions for ask in ASK_FUNCTION]
    draw.shuffle(combined)
    prompts = [(line, line) for line in written] + combined[: PER_DOMAIN - len(written)]
    draw.shuffle(prompts)
    return prompts


# -- structured extraction -------------------------------------------------------------------------

FIRST = (
    "Ada|Boris|Chiara|Dmitri|Elena|Farid|Greta|Hugo|Ines|Jonas|Katrin|Liam|Maya|Nadia|Oscar|Priya|"
    "Quentin|Rosa|Samir|Tove|Ulrich|Vera|Wanda|Yusuf|Zoe"
).split("|")
LAST = (
    "Abbott|Berger|Castillo|Dahl|Evans|Fontaine|Gupta|Hansen|Ivanova|Jensen|Kowalski|Lindgren|"
    "Moreau|Novak|Okafor|Petrov|Quist|Rossi|Santos|Tanaka|Usman|Vogel|Weber|Yilmaz|Zhang"
).split("|")
CITIES = (
    "Lisbon|Oslo|Nairobi|Toronto|Osaka|Lima|Dublin|Prague|Hanoi|Denver|Ghent|Tunis|Quito|Perth|"
    "Riga|Bergen|Porto|Bilbao|Krakow|Leeds"
).split("|")
PRODUCTS = (
    "desk lamp|steel kettle|running shoes|garden hose|wool blanket|phone charger|coffee grinder|"
    "yoga mat|office chair|rain jacket|water bottle|alarm clock|cutting board|bike helmet|"
    "bluetooth speaker|reading glasses|tent|paper shredder"
).split("|")
COLOURS = "black|white|green|blue|red|grey|yellow|brown".split("|")
MONTHS = (
    "January|February|March|April|May|June|July|August|September|October|November|December"
).split("|")
EVENTS = (
    "book fair|jazz concert|city marathon|robotics workshop|food market|poetry reading|"
    "photography course|chess tournament|open-air cinema|museum night|pottery class|charity run"
).split("|")
JOBS = (
    "electrician|data analyst|school nurse|bus driver|architect|translator|pastry chef|"
    "lab technician|gardener|accountant|carpenter|librarian"
).split("|")
PROBLEMS = (
    "the screen stays black after the update|invoices are sent twice|the login page shows error 502|"
    "the printer prints empty pages|search results are out of order|the app closes on start|"
    "passwords can't be reset|the export misses the last row|the map does not load|"
    "push messages arrive hours late|the upload stops at 99 percent|dates are a day off"
).split("|")
SKIES = "light rain|clear skies|heavy snow|thick fog|scattered clouds|strong wind".split("|")
AIRLINES = "Northwind|Skybridge|Blue Heron|Altair|Polaris|Sunline".split("|")
CUISINES = "Thai|Ethiopian|Greek|Mexican|Georgian|Vietnamese|Lebanese|Basque".split("|")


def person(draw: random.Random) -> tuple[str, str]:
    name = f"{draw.choice(FIRST)} {draw.choice(LAST)}"
    job, city, age = draw.choice(JOBS), draw.choice(CITIES), draw.randint(19, 71)
    text = draw.choice(
        (
            f"{name}, {age}, works as a {job} and has lived in {city} since {2026 - age % 17}.",
            f"The new {job} is called {name}. At {age} years of age, moving to {city} was a big step.",
            f"In {city} we met {name}, a {job} who has just turned {age}.",
        )
    )
    return "name, age, job, city", text


def order(draw: random.Random) -> tuple[str, str]:
    name, product = f"{draw.choice(FIRST)} {draw.choice(LAST)}", draw.choice(PRODUCTS)
    count, price = draw.randint(2, 12), f"{draw.randint(5, 180)}.{draw.choice(('00', '50', '90'))}"
    colour, number = draw.choice(COLOURS), draw.randint(10_000, 99_999)
    text = draw.choice(
        (
            f"Order {number}: {name} bought {count} pieces of the {colour} {product} at {price} each.",
            f"{name} wrote that order {number} ({count} x {product}, {colour}, {price} EUR) is late.",
            f"Please send {count} units of {product} in {colour} to {name}. "
            f"Price per unit: {price}. Reference: {number}.",
        )
    )
    return "order_number, customer, product, color, quantity, unit_price", text


def event(draw: random.Random) -> tuple[str, str]:
    what, city = draw.choice(EVENTS), draw.choice(CITIES)
    day, month, hour = draw.randint(1, 28), draw.choice(MONTHS), draw.randint(9, 20)
    seats = draw.randint(2, 90) * 10
    text = draw.choice(
        (
            f"The {what} takes place in {city} on {day} {month} at {hour}:00. There are {seats} places.",
            f"{month} {day}: {what} in {city}, doors open at {hour}:30, {seats} tickets left.",
            f"Don't miss this year's {what}! {city}, {day} {month}, from {hour}:15 on. "
            f"We expect {seats} visitors.",
        )
    )
    return "event, city, date, start_time, capacity", text


def ticket(draw: random.Random) -> tuple[str, str]:
    problem, name = draw.choice(PROBLEMS), f"{draw.choice(FIRST)} {draw.choice(LAST)}"
    version = f"{draw.randint(1, 9)}.{draw.randint(0, 20)}"
    priority, users = draw.choice(("low", "medium", "high", "urgent")), draw.randint(2, 400)
    text = draw.choice(
        (
            f"{name} reports with {priority} priority that in version {version} {problem}. "
            f"{users} users are affected.",
            f"Since version {version}, {problem}. About {users} people see it. "
            f"Priority: {priority}. Reported by {name}.",
            f"Support call from {name}: {problem} (version {version}, {users} users, {priority}).",
        )
    )
    return "reporter, problem, version, affected_users, priority", text


def weather(draw: random.Random) -> tuple[str, str]:
    city, sky = draw.choice(CITIES), draw.choice(SKIES)
    high, wind = draw.randint(-8, 34), draw.randint(4, 80)
    low, humidity = high - draw.randint(3, 11), draw.randint(30, 98)
    text = draw.choice(
        (
            f"{city}: {sky}, between {low} and {high} degrees, wind {wind} km/h, "
            f"humidity {humidity} percent.",
            f"Tomorrow {city} can expect {sky} with a high of {high} and a low of {low}. "
            f"Wind speeds reach {wind} km/h and humidity {humidity}%.",
        )
    )
    return "city, sky, high, low, wind_kmh, humidity", text


def flight(draw: random.Random) -> tuple[str, str]:
    start, end = draw.sample(CITIES, 2)
    airline, number = draw.choice(AIRLINES), draw.randint(100, 999)
    gate, delay = f"{draw.choice('ABCDEF')}{draw.randint(1, 48)}", draw.randint(5, 180)
    hour, minute = draw.randint(5, 22), draw.choice(("05", "20", "35", "50"))
    text = draw.choice(
        (
            f"{airline} flight {number} from {start} to {end} leaves gate {gate} at {hour}:{minute}, "
            f"{delay} minutes late.",
            f"Attention: {airline} {number} to {end} is delayed by {delay} minutes and now departs "
            f"from {start} at {hour}:{minute} at gate {gate}.",
        )
    )
    return "airline, flight_number, origin, destination, departure, gate, delay_minutes", text


def review(draw: random.Random) -> tuple[str, str]:
    place = f"{draw.choice(LAST)}'s Kitchen"
    city, cuisine, stars = draw.choice(CITIES), draw.choice(CUISINES), draw.randint(1, 5)
    price, name = draw.randint(12, 75), draw.choice(FIRST)
    text = draw.choice(
        (
            f"{name} gave {place} in {city} {stars} of 5 stars. The {cuisine} menu cost {price} euros.",
            f"{place} ({cuisine}, {city}): we paid {price} euros a head. {stars} stars, says {name}.",
        )
    )
    return "restaurant, city, cuisine, stars, price, reviewer", text


EXTRACT_ASKS = (
    "Extract {0} from the text as a JSON object. Answer with JSON only.\n\nText: {1}",
    "Return a JSON object with the keys {0} for this text. Answer with JSON only.\n\n{1}",
    "Text: {1}\n\nWrite {0} as one JSON object and nothing else.",
)


def extraction_prompts(draw: random.Random) -> Grouped:
    kinds = itertools.cycle((person, order, event, ticket, weather, flight, review))
    asks = itertools.cycle(EXTRACT_ASKS)
    texts: dict[str, str] = {}
    while len(texts) < PER_DOMAIN:
        keys, text = next(kinds)(draw)
        texts.setdefault(text, next(asks).format(keys, text))
    prompts = [(prompt, text) for text, prompt in texts.items()]
    draw.shuffle(prompts)
    return prompts


# -- the file --------------------------------------------------------------------------------------

DOMAINS = {
    "chat": (chat_prompts, 128),
    "code": (code_prompts, 160),
    "extraction": (extraction_prompts, 96),
}


def rows() -> list[dict[str, object]]:
    """All prompts; the domains take turns, so that any stretch of the file is a mix of them."""
    columns = []
    for domain, (make, max_tokens) in DOMAINS.items():
        prompts = make(random.Random(f"{SEED} {domain}"))
        held_out: set[str] = set()
        for _, group in prompts:
            if sum(about in held_out for _, about in prompts) < HELD_OUT:
                held_out.add(group)
        columns.append(
            [
                {
                    "domain": domain,
                    "prompt": prompt,
                    "max_tokens": max_tokens,
                    "held_out": group in held_out,
                }
                for prompt, group in prompts
            ]
        )
    return [row for turn in zip(*columns, strict=True) for row in turn]


def content() -> str:
    return "".join(json.dumps(row) + "\n" for row in rows())


if __name__ == "__main__":
    OUT.write_text(content())
    print(f"{OUT.name}: {len(rows())} prompts")
