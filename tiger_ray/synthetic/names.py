"""Names of planted items: genres, nouns, authors, places."""

from __future__ import annotations

_GENRES = {
    "Mystery": ["Lighthouse", "Alibi", "Witness", "Locket", "Ledger", "Inspector", "Cellar", "Verdict"],
    "Fantasy": ["Dragon", "Throne", "Sorceress", "Rune", "Griffin", "Kingdom", "Amulet", "Prophecy"],
    "Science Fiction": ["Starship", "Colony", "Android", "Nebula", "Orbit", "Reactor", "Galaxy", "Satellite"],
    "Romance": ["Wedding", "Letter", "Bakery", "Summer", "Promise", "Dance", "Bouquet", "Kiss"],
    "Horror": ["Asylum", "Crypt", "Scarecrow", "Ritual", "Phantom", "Attic", "Graveyard", "Howl"],
    "History": ["Regiment", "Empress", "Cathedral", "Armada", "Treaty", "Merchant", "Siege", "Dynasty"],
    "Travel": ["Caravan", "Island", "Railway", "Summit", "Harbour", "Desert", "Voyage", "Compass"],
    "Cooking": ["Kitchen", "Harvest", "Vineyard", "Spice", "Orchard", "Feast", "Skillet", "Pantry"],
    "Adventure": ["Expedition", "Treasure", "Jungle", "Pirate", "Glacier", "Volcano", "Canyon", "Shipwreck"],
    "Poetry": ["Sonnet", "Nightingale", "Meadow", "Elegy", "Willow", "Lantern", "Swallow", "Murmur"],
}


_NOUNS_PER_GENRE = 8


_ADJECTIVES = [
    *("Amber", "Silver", "Crimson", "Hidden", "Silent", "Broken", "Golden", "Frozen", "Hollow", "Emerald"),
    *(
        "Burning",
        "Distant",
        "Gentle",
        "Iron",
        "Ivory",
        "Lonely",
        "Midnight",
        "Painted",
        "Restless",
        "Scarlet",
    ),
]


_SUBTITLES = [
    *("Beginnings", "Crossings", "Secrets", "Shadows", "Embers"),
    *("Tempests", "Betrayals", "Homecomings", "Reckonings", "Farewells"),
]


_PLACES = [
    *("Ald", "Bran", "Cor", "Dun", "Esk", "Fen", "Glen", "Hart", "Inver", "Jed"),
    *("Kirk", "Lang", "Mar", "Nor", "Oak", "Pen", "Quin", "Rav", "Stan", "Thorn"),
    *("Ulf", "Ver", "Wick", "Yar", "Zel", "Ash", "Birk", "Craw", "Dray", "Elm"),
]


_PLACE_ENDINGS = [
    *("vane", "moor", "haven", "ford", "ley", "wick", "dale", "mouth", "stead", "combe"),
    *("holm", "bury", "gate", "fell", "mere", "ton", "shaw", "worth", "brook", "cliff"),
]


_FIRST_NAMES = [
    *("Ada", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Keiko", "Lars"),
    *("Mina", "Nils", "Olga", "Pablo", "Rosa", "Samir", "Tove", "Ursula", "Viktor", "Wanda", "Yusuf", "Zora"),
]


_LAST_NAMES = [
    *("Marlow", "Okafor", "Lindqvist", "Tanaka", "Moreau", "Castellano", "Whitlock", "Novak"),
    *("Haddad", "Brandt", "Kowalski", "Ferreira", "Sandoval", "Ivanova", "Mbeki", "Thorne"),
    *("Petrov", "Dubois", "Carmody", "Rasmussen", "Nakamura", "Holloway", "Vasquez", "Achebe"),
    *("Bergman", "Delacroix", "Fitzroy", "Grimaldi", "Jansen", "Quincey", "Sorensen", "Yamada"),
]


_LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def _series_names() -> int:
    per_genre = len(_ADJECTIVES) * _NOUNS_PER_GENRE * (1 + len(_PLACES) * len(_PLACE_ENDINGS))
    return per_genre * len(_GENRES)


def _author_names() -> int:
    return len(_FIRST_NAMES) * len(_LAST_NAMES) * (1 + len(_LETTERS) ** 2)
