"""Questions and answers in English, from five words to a few hundred: text to measure errors on."""

_TEXT = """
What is the capital of Norway?
--
Oslo.
====
Say hello.
--
Hello! How can I help you today?
====
What is 17 times 23?
--
17 times 23 is 391: 17 times 20 is 340, 17 times 3 is 51, and together they make 391.
====
Name the four seasons in order, beginning with the one in which snow falls.
--
Winter, spring, summer, autumn.
====
Why is the sky blue?
--
Sunlight holds all colours, and air scatters short waves far more than long ones: the strength of
the scattering grows with the fourth power of the frequency. So blue light reaches your eye from
every direction, while red light mostly travels straight on. Violet is scattered even more, but the
sun sends less of it, part of it is absorbed high up, and our eyes are less sensitive to it. In the
evening the light has crossed so much air that the blue is gone, and what is left looks red.
====
Write a short poem about an old lighthouse.
--
It blinks above the broken stones,
A patient eye, a tower of bones,
And though the ships have learned to steer
By stars of steel, it still stands here,
And counts the waves, and does not tire,
And keeps, for no one's sake, its fire.
====
How do I boil an egg so that the yolk stays soft?
--
1. Bring a small pot of water to a rolling boil.
2. Lower the egg in with a spoon, straight from the fridge.
3. Set a timer for six and a half minutes.
4. Put the egg into cold water for a minute, then peel it under the tap.
For a firmer yolk add a minute; for a runny one take half a minute away.
====
Translate to French: "The train to Lyon leaves at half past seven."
--
"Le train pour Lyon part à sept heures et demie."
====
Write a Python function that returns the n-th Fibonacci number without recursion.
--
def fibonacci(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a

The loop keeps two neighbours of the sequence, so it needs n additions and constant memory.
====
What is the difference between a list and a tuple in Python?
--
A list can be changed after it was made: you may append, remove or replace elements. A tuple cannot.
That makes tuples hashable if their elements are, so they can be keys of a dictionary, and it tells
the reader that the number and meaning of the elements is fixed, as in a point (x, y).
====
A farmer has 3 fields. On each there are 4 trees, on each tree 12 apples. He sells half of all
apples at 2 coins each. How many coins does he get?
--
There are 3 x 4 = 12 trees and 12 x 12 = 144 apples. Half of them is 72, and 72 x 2 = 144. He gets
144 coins.
====
Who wrote "Pride and Prejudice", and when did it appear?
--
Jane Austen wrote it; it was published in 1813, without her name on the title page.
====
Give me three names for a bakery that is next to a railway station.
--
The Early Crust, Platform Loaf, and Rolls & Rails.
====
Summarise the following in one sentence. The council met on Tuesday to discuss the bridge. Some
members wanted to repair it at once, since the winter could close it for months; others pointed out
that the money was set aside for the school roof. After three hours they agreed to close one lane,
to put up a weight limit, and to ask the region for a loan before the end of the year.
--
The council decided to restrict traffic on the damaged bridge and to ask the region for a loan
rather than take the school roof's money for an immediate repair.
====
How far away is the Moon?
--
About 384,000 kilometres on average; between 363,000 at its closest and 405,000 at its farthest.
====
Explain to a ten-year-old what an atom is.
--
Imagine you cut a piece of cheese in half, and again, and again. After about eighty cuts you could
not cut any more without the pieces stopping to be what they were. Those tiny pieces are atoms, or
small groups of them. An atom has a heavy speck in the middle, the nucleus, and around it live even
lighter things called electrons. Almost all of it is empty space! Everything you can touch is made
of about ninety kinds of atoms, put together in different ways, as all words are made from the same
letters.
====
Is a tomato a fruit?
--
To a botanist, yes: it grows from a flower and holds the seeds. To a cook it is a vegetable, because
it is eaten in salads and sauces rather than for dessert.
====
Turn this into JSON: Anna is 34 years old, lives in Graz and has two cats called Mimi and Tom.
--
{"name": "Anna", "age": 34, "city": "Graz", "cats": ["Mimi", "Tom"]}
====
I have a job interview tomorrow and I am nervous. What should I do tonight?
--
Read the job advertisement once more and write down three things you did that fit it, each with a
number or a result. Think of two questions that you would really like to have answered. Lay out your
clothes, look up the way, and plan to be there ten minutes early. Then stop: go for a walk, eat
something you like, and go to bed at the usual time. Being a little nervous is normal, and the
people who talk to you know it. They invited you because they hope that you are the right one.
====
What is the derivative of x^3 * sin(x)?
--
By the product rule it is 3x^2 * sin(x) + x^3 * cos(x), or x^2 * (3 sin(x) + x cos(x)).
====
List the planets from the largest to the smallest.
--
Jupiter, Saturn, Uranus, Neptune, Earth, Venus, Mars, Mercury.
====
Complete the sentence: "If it had not rained on the day of the wedding,"
--
"If it had not rained on the day of the wedding, nobody would have danced in the barn, and my
parents would never have met."
====
What does the command "grep -rn TODO src | wc -l" do?
--
It counts the lines that contain TODO in all files under src. grep -r searches the folder and what
is below it, -n puts the line's number in front of each hit, and wc -l counts the lines it gets. The
-n makes no difference to the count.
====
Tell me a short story about a fox that could count.
--
In the hills behind the mill there lived a fox who could count, and she was proud of it. She counted
the stars until the clouds came, the geese until they flew away, and the steps from her den to the
river, which were four hundred and six. One winter the river rose. The other animals ran into the
wood, each by its own way, and in the dark they lost one another. The fox sat on a stump and counted
those who came by: two hares, a badger, five mice. "There were six mice in autumn," she said, and
turned back. She counted her steps, for nothing could be seen; at three hundred and ninety she heard
a squeak, and at four hundred and one she held the sixth mouse between her teeth, very carefully.
From then on nobody laughed when she counted. And the mice, when they are asked how many they are,
still answer: "Ask the fox."
====
Which is heavier, a kilogram of feathers or a kilogram of iron?
--
Both have the same mass. On a scale in air the feathers seem a little lighter, because they push
aside more air.
====
Give the chemical formulas of water, table salt, ammonia and methane.
--
H2O, NaCl, NH3 and CH4.
====
What happened in Berlin on the ninth of November 1989?
--
The border was opened. In the evening a spokesman of the government read out new rules for travel
and said, asked when they would come into force, "as far as I know, immediately, without delay".
Thousands went to the crossings; shortly before midnight the guards at Bornholmer Strasse gave way,
and people from both sides climbed the Wall.
====
My code says "IndexError: list index out of range". What does it mean?
--
You asked a list for an element that it does not have. A list of n elements has the indices 0 to
n - 1, so items[len(items)] is already one too far. The usual causes are a loop that runs once too
often, an empty list that was expected to hold something, or splitting a line that has fewer parts
than usual. The last line of the traceback names the place; print the list's length and the index
just before it.
====
Write an e-mail to my landlord: the heating in the kitchen has not worked since Monday.
--
Subject: Heating in the kitchen, flat 12

Dear Ms Keller,

since Monday the radiator in our kitchen has stayed cold; the others work as usual. I have bled it,
which did not help. Could you please send someone to look at it this week? I am at home every day
after four o'clock, and on Friday all day.

Thank you and kind regards,
Jonas Weber
====
Describe how a bill becomes a law, in two sentences.
--
A bill is introduced in one chamber, examined and changed in committee, and put to a vote; if it
passes, the other chamber does the same. When both have agreed on one text it goes to the head of
state, whose signature makes it a law.
====
Count from one to twenty in words.
--
One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen,
fifteen, sixteen, seventeen, eighteen, nineteen, twenty.
====
What are the advantages and disadvantages of living in a small town?
--
On the one hand, much is near: you walk to work, to the shops and to the woods, you know your
neighbours, and they notice when you are ill. Rents are lower, children play outside, and the noise
of traffic does not keep you awake. On the other hand, choice is small. There may be one doctor, one
cinema with one film, and no train after ten. Who looks for a special kind of work often has to
drive far, and who wants to be left alone finds that everybody knows where the car was parked last
night. Whether the first list weighs more than the second depends on the years of life one is in:
many leave at twenty and come back at thirty-five.
"""

CONVERSATIONS: tuple[tuple[str, str], ...] = tuple(
    (question.strip(), answer.strip())
    for question, answer in (block.split("\n--\n") for block in _TEXT.split("\n====\n"))
)
