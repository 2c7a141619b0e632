"""A typed remote method: its number, its request and reply structs, and how they become bytes."""

from typing import Generic, TypeVar

import msgspec

from emberfs.proto.bounds import UNDECODABLE
from emberfs.proto.errors import Code, EmberfsError

Request = TypeVar("Request", bound=msgspec.Struct)
Answer = TypeVar("Answer", bound=msgspec.Struct)

_ENCODE = msgspec.msgpack.Encoder().encode


class Method(Generic[Request, Answer]):
    """One method of the data plane."""

    def __init__(
        self, number: int, name: str, request: type[Request], answer: type[Answer]
    ) -> None:
        self.number = number
        self.name = name
        self.request_type = request
        self.answer_type = answer
        self._request = msgspec.msgpack.Decoder(request)
        self._answer = msgspec.msgpack.Decoder(answer)

    def encode_request(self, request: Request) -> bytes:
        """Return the request's body."""
        return _ENCODE(request)

    def encode_answer(self, answer: Answer) -> bytes:
        """Return the reply's body."""
        return _ENCODE(answer)

    def decode_request(self, body: bytes | memoryview) -> Request:
        """Parse a request; MALFORMED names the field that is wrong."""
        try:
            return self._request.decode(body)
        except UNDECODABLE as problem:
            raise EmberfsError(Code.MALFORMED, f"{self.name} request: {problem}") from None

    def decode_answer(self, body: bytes | memoryview) -> Answer:
        """Parse a reply; MALFORMED names the field that is wrong."""
        try:
            return self._answer.decode(body)
        except UNDECODABLE as problem:
            raise EmberfsError(Code.MALFORMED, f"{self.name} reply: {problem}") from None
