"""Who an address belongs to when several objects name it: the one with the best claim, always the same one."""

from typing import NamedTuple


class Owner(NamedTuple):
    """The object that claims: its namespace and name."""

    namespace: str
    name: str


Rank = tuple[bool, str]
"""How good a claim is, the smallest first: (yields to all that don't yield, age); names break the tie."""


class AddressClaims:
    """Claims to addresses (packed, 4 or 16 bytes) by objects of one kind."""

    def __init__(self) -> None:
        self._claims: dict[bytes, dict[Owner, Rank]] = {}
        self._addresses: dict[Owner, tuple[bytes, ...]] = {}

    def claim(self, owner: Owner, rank: Rank, addresses: tuple[bytes, ...]) -> set[Owner]:
        """Replace the owner's claims; returns the other owners who may have won or lost an address by that."""
        others = self.release(owner)
        if addresses:
            self._addresses[owner] = addresses
        for address in addresses:
            claims = self._claims.setdefault(address, {})
            others.update(claims)
            claims[owner] = rank
        return others

    def release(self, owner: Owner) -> set[Owner]:
        """Drop the owner's claims; returns the other owners who may have won an address by that."""
        others: set[Owner] = set()
        for address in self._addresses.pop(owner, ()):
            claims = self._claims[address]
            del claims[owner]
            others.update(claims)
            if not claims:
                del self._claims[address]
        return others

    def holder(self, address: bytes) -> Owner | None:
        """Whose the address is, None if nobody claims it."""
        claims = self._claims.get(address)
        return min(claims, key=lambda owner: (claims[owner], owner)) if claims else None
