"""The words that `prompts` puts into its forms."""

from __future__ import annotations

FORMS = [
    "What is {topic}?",
    "Explain {topic} to a child.",
    "Explain {topic} in simple terms.",
    "Explain {topic} in one paragraph.",
    "Give me {n} facts about {topic}.",
    "Give me {n} tips about {topic}.",
    "List {n} benefits of {topic}.",
    "List {n} problems with {topic}.",
    "Why is {topic} important?",
    "How does {topic} work?",
    "What is the history of {topic}?",
    "Write a short essay about {topic}.",
    "Write a poem about {topic}.",
    "Write an introduction to a talk about {topic}.",
    "Compare {topic} and {other}.",
    "What do {topic} and {other} have in common?",
    "What are common mistakes with {topic}?",
    "How can I learn about {topic}?",
    "Make a plan of {n} steps to get started with {topic}.",
    "What are the advantages and disadvantages of {topic}?",
    "Summarise what you know about {topic} in {n} sentences.",
    "Write {n} questions for a quiz about {topic}, with answers.",
    "Write a headline for an article about {topic}.",
    "Write an advertisement about {topic}.",
    "What does a beginner need to know about {topic}?",
    "Who needs {topic}?",
    "Write a dialogue between a teacher and a student about {topic}.",
    "Describe {topic} without using difficult words.",
    "How will {topic} change in the next ten years?",
    "What books should I read about {topic}?",
    "Write a product description that mentions {topic}.",
    "Tell me something surprising about {topic}.",
    "Is {topic} good or bad? Give reasons.",
    "What is the difference between {topic} and {other}?",
    "Write a tweet about {topic}.",
    "Define {topic} in one sentence.",
    "Write an email to a friend about {topic}.",
    "What tools are used in {topic}?",
    "Give an example of {topic} in everyday life.",
    "Argue in favour of {topic}.",
]

HEARD = [
    "Summarise this text in {n} sentences:\n\n{passage}",
    "Explain this in simple words:\n\n{passage}",
    "Rewrite this text in your own words:\n\n{passage}",
    "What is this text about?\n\n{passage}",
    "Make this text shorter:\n\n{passage}",
    "Write {n} questions about this text:\n\n{passage}",
    "List the main points of this text:\n\n{passage}",
    "Correct the grammar of this text:\n\n{passage}",
    "Continue this text:\n\n{passage}",
    "Give this text a title:\n\n{passage}",
    "{passage}\n\nWhat does this mean?",
    "Rewrite this text so that it is friendly:\n\n{passage}",
    "Repeat this text:\n\n{passage}",
    "Which of the words here is the most important, and why?\n\n{passage}",
    "Translate this text into French:\n\n{passage}",
    "Write a sentence with '{word}' that fits behind this text:\n\n{passage}",
]

_TOPICS = """photosynthesis; gravity; black holes; the water cycle; volcanoes; earthquakes; climate change; solar
power; wind energy; nuclear energy; electricity; magnetism; sound; light; atoms; molecules; chemical reactions; acids
and bases; evolution; genetics; DNA; cells; bacteria; viruses; vaccines; the immune system; the human heart; the human
brain; digestion; sleep; dreams; memory; nutrition; vitamins; exercise; yoga; meditation; running; swimming; football;
basketball; tennis; chess; cycling; hiking; climbing; skiing; sailing; fishing; gardening; growing tomatoes;
composting; bees; butterflies; ants; spiders; whales; dolphins; sharks; penguins; elephants; lions; wolves; cats;
dogs; horses; birds; dinosaurs; forests; deserts; oceans; rivers; mountains; islands; the moon; the sun; the solar
system; Mars; comets; galaxies; space travel; satellites; telescopes; the weather; clouds; rain; snow; tornadoes; the
seasons; maps; the compass; time zones; calendars; clocks; money; banks; taxes; inflation; the stock market;
insurance; saving money; budgets; starting a business; marketing; advertising; negotiation; leadership; teamwork; job
interviews; writing a resume; remote work; time management; public speaking; writing well; reading; grammar; poetry;
novels; short stories; fairy tales; myths; theatre; film; photography; painting; drawing; sculpture; architecture;
music; the piano; the guitar; the violin; jazz; classical music; opera; dance; fashion; cooking; baking bread; making
soup; coffee; tea; chocolate; cheese; pasta; rice; pizza; salads; healthy breakfasts; vegetarian food; spices; fruit;
vegetables; ancient Egypt; ancient Greece; the Roman Empire; the Middle Ages; the Renaissance; the Industrial
Revolution; the French Revolution; the printing press; the steam engine; railways; cars; electric cars; aeroplanes;
ships; bicycles; bridges; skyscrapers; roads; cities; farms; democracy; constitutions; elections; courts; human
rights; education; schools; universities; homework; exams; learning languages; the English language; Latin; sign
language; translation; mathematics; algebra; geometry; probability; statistics; prime numbers; fractions; logic;
philosophy; ethics; happiness; friendship; honesty; courage; patience; kindness; anger; stress; habits;
procrastination; creativity; curiosity; computers; programming; algorithms; data structures; databases; the internet;
e-mail; web browsers; social media; passwords; computer viruses; encryption; artificial intelligence; machine
learning; neural networks; robots; video games; smartphones; batteries; cameras; open-source software; version
control; software testing; operating systems; spreadsheets; 3D printing; virtual reality; drones; recycling; plastic;
pollution; clean water; deforestation; endangered animals; public transport; travel; camping; packing a suitcase;
hotels; museums; libraries; birthdays; weddings; holidays; New Year; gifts; parenting; babies; pets; training a dog;
moving house; renting a flat; furniture; cleaning; laundry; first aid; headaches; colds; allergies; teeth; glasses;
posture; stretching; walking; breathing; hospitals; nurses; doctors; firefighters; teachers; engineers; lawyers;
farmers; journalists; newspapers; radio; television; podcasts; advertising on television; customer service; online
shopping; supply chains; trade; glass; paper; steel; gold; wood; concrete; cotton; wool; silk; salt; sugar; honey;
olive oil; rubber; oil; coal; hydrogen"""
TOPICS = [topic.strip() for topic in _TOPICS.replace("\n", " ").split(";")]

_NAMES = """Anna, Ben, Clara, David, Emma, Felix, Grace, Hugo, Ines, Jack, Karim, Lena, Maria, Noah, Olga, Paul, Rosa,
Sam, Tara, Umar, Vera, Will, Yara, Zoe, Amir, Bella, Carlos, Diana, Elif, Frank, Gina, Hana, Ivan, Julia, Kofi, Lucy,
Mark, Nina, Oscar, Priya, Robert, Sofia, Tom, Wei, an old sailor, a young doctor, a tired teacher, a curious child, a
small robot, a lonely king, a clever fox, a lost dog, a brave mouse, a baker, a painter, a farmer, a detective, a
musician, a pilot, a gardener"""
NAMES = [name.strip() for name in _NAMES.replace("\n", " ").split(",")]

ACTIVITIES = [
    "lives alone", "works at night", "waits for a friend", "loses a key", "hears a strange noise",
    "plants a tree", "opens a shop", "learns to swim", "builds a boat", "writes a book", "meets a stranger",
    "repairs an old clock", "gets lost", "wins a prize", "tells a lie", "finds a letter",
    "cooks for twenty people", "misses the last train", "forgets a promise", "paints a wall",
]  # fmt: skip
PLACES = [
    "in a small town", "by the sea", "on a mountain", "in a big city", "in the forest", "at school",
    "in a library", "on a train", "on an island", "in the desert", "at the airport", "in a hospital", "in winter",
    "on a rainy day", "at the market", "in space", "in an old house", "on a farm", "under water", "at home",
    "in the park", "during a storm",
]  # fmt: skip

_THINGS = """lamp, chair, table, bicycle, umbrella, hammer, pencil, notebook, camera, clock, mirror, bottle, knife,
kettle, basket, ladder, candle, blanket, suitcase, telescope, microscope, guitar, violin, piano, drum, boat, car,
train, kite, ball, doll, ring, coat, hat, shoe, glove, key, door, window, bridge, garden, tree, flower, stone, map,
letter, book, newspaper, phone, computer, keyboard, printer, robot, fridge, oven, spoon, plate, cup, bag, wallet,
ticket, coin, watch, scarf, pillow, carpet, shelf, bed"""
THINGS = [thing.strip() for thing in _THINGS.replace("\n", " ").split(",")]

_COUNTRIES = """France, Germany, Italy, Spain, Portugal, Greece, Norway, Sweden, Finland, Denmark, Poland, Austria,
Switzerland, Ireland, Scotland, Iceland, Turkey, Egypt, Morocco, Kenya, Nigeria, Ghana, South Africa, Ethiopia, India,
China, Japan, Korea, Thailand, Vietnam, Indonesia, Australia, New Zealand, Canada, Mexico, Brazil, Argentina, Chile,
Peru, Colombia, Cuba, Jamaica, the Netherlands, Belgium, Hungary, Romania, Ukraine, Nepal, Mongolia, Malaysia"""
COUNTRIES = [country.strip() for country in _COUNTRIES.replace("\n", " ").split(",")]

_WORDS = """happy, brave, gentle, quick, silent, ancient, modern, bright, narrow, heavy, honest, clever, curious,
careful, generous, stubborn, fragile, enormous, ordinary, rare, journey, promise, shadow, whisper, harvest, courage,
wisdom, mystery, balance, freedom, justice, memory, border, bargain, pattern, rhythm, solution, argument, evidence,
opinion, abandon, achieve, borrow, convince, decline, discover, encourage, explain, forgive, gather, hesitate,
imagine, improve, notice, observe, persuade, postpone, protect, replace, struggle, although, nevertheless, therefore,
meanwhile, however, serendipity, nostalgia, ambiguous, resilient, empathy, hypothesis, paradox, metaphor, irony,
sustainable, diligent, eloquent, obsolete, versatile, tranquil"""
WORDS = [word.strip() for word in _WORDS.replace("\n", " ").split(",")]
