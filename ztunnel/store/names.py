"""What names and labels may look like, by the rules of Kubernetes. Pure functions of texts."""

import re
from functools import lru_cache

from ztunnel.store.models import Namespace, Object, Service

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")

_NAME_RULE = (
    "use at most {limit} lower case letters, digits and '-', {start} and ending with a letter or digit"
)


@lru_cache(maxsize=8192)
def label_key_fault(key: str) -> str:
    """Why `key` is no label or annotation key, "" if it is one (Kubernetes' qualified names: PREFIX/NAME)."""
    prefix, slash, name = key.rpartition("/")
    if slash and not (prefix and len(prefix) <= 253 and _SUBDOMAIN.fullmatch(prefix)):
        return "the part before '/' must be a DNS name in lower case, at most 253 characters"
    if not name or len(name) > 63 or not _QUALIFIED.fullmatch(name):
        return "the name must be 1-63 letters, digits, '-', '_' or '.', beginning and ending with a letter or digit"
    return ""


@lru_cache(maxsize=8192)
def label_value_fault(value: str) -> str:
    """Why `value` is no label value, "" if it is one; the empty value is one."""
    if value and (len(value) > 63 or not _QUALIFIED.fullmatch(value)):
        return (
            "a label's value must be empty or at most 63 letters, digits, '-', '_' or '.', beginning and ending "
            "with a letter or digit"
        )
    return ""


@lru_cache(maxsize=8192)
def name_fault(kind: type[Object], name: str) -> str:
    """Why an object of this kind cannot be called `name`, "" if it can; the answer says what is allowed."""
    if kind is Service:
        if len(name) > 63 or not _LABEL_1035.fullmatch(name):
            return _NAME_RULE.format(limit=63, start="beginning with a letter")
    elif kind is Namespace:
        return dns_label_fault(name)
    elif len(name) > 253 or not _SUBDOMAIN.fullmatch(name):
        return _NAME_RULE.format(limit=253, start="'.' between parts, beginning")
    return ""


def dns_label_fault(name: str) -> str:
    """Why `name` is no DNS label (RFC 1123), "" if it is one."""
    if len(name) > 63 or not _LABEL.fullmatch(name):
        return _NAME_RULE.format(limit=63, start="beginning")
    return ""
