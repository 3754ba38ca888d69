"""The vocabulary of the generated requests, and the ways to write dates, times and durations."""

from __future__ import annotations

from datetime import date, datetime
from random import Random


def _split(lines: str) -> list[str]:
    return [item.strip() for item in lines.replace("\n", "|").split("|") if item.strip()]


EVENT_NAMES = _split("""
    Vendor Selection Call | Roadmap Walkthrough | Hiring Panel Debrief | Budget Check-in | Design Critique
    Incident Review | Release Planning | Customer Advisory Call | Security Drill | Quarter Kick-off
    Data Migration Review | Partner Sync | Accessibility Audit | Pricing Workshop | Team Lunch Planning
    Architecture Forum | Onboarding Buddy Chat | Research Readout | Sprint Demo | Contract Negotiation
    Support Rotation Handover | Press Briefing Prep | Capacity Planning | Mentoring Session
    Brand Refresh Talk | Compliance Walkthrough | Launch Rehearsal | Beta Feedback Round
    Office Move Planning | Backlog Grooming | Year in Review | Storage Cost Review | Goal Setting Session
    Usability Test | Travel Planning | Knowledge Sharing Hour | Quality Circle | Forecast Update
    Campaign Wrap-up | Interview Training
""")

TASK_VERBS = _split(
    "Document | Refactor | Test | Review | Prototype | Redesign | Migrate | Monitor | Simplify | Audit"
)
TASK_OBJECTS = _split("""
    invoice export | password reset flow | search index | mobile navigation | error pages | session cache
    image upload | billing dashboard | release notes page | permission model | notification settings
    data retention job | icon set | checkout form | audit log | signup wizard | rate limiter | help center
    calendar widget | deployment script | feature flags | color palette | PDF reports | webhook retries
    user avatars | backup schedule
""")

SUBJECTS = _split("""
    Travel budget | Quick question | Offsite agenda | Contract draft | New laptop | Server maintenance
    Parking spots | Sales figures | Holiday schedule | Training materials | Client visit | Expense report
    Board slides | Test results | Office keys | Team photo | Survey results | Printer issue | Lunch on Friday
    Welcome aboard | Roadmap draft | Customer feedback | Hiring update | Invoice 4471 | Access request
    Meeting notes | Design files | Launch checklist | Price list | Press release | Support hours
    Data request | Badge renewal | Demo script | Vendor quotes | Security training | Workshop plan
    Status report | Room booking | Next steps
""")
BODY_OPENINGS = _split("""
    Thanks for the update | I had a look at the draft | This is ready from my side
    We are running a bit late | The client asked about this today | I shared the file with you
    The numbers look good | Something came up on our end | I talked to the team | Please treat this as urgent
    Great work on this | Here is a short reminder | The plan has changed | I could not open the attachment
    The deadline has moved | We got the approval | I will be out tomorrow | Everything is on track
""")
BODY_ENDINGS = _split("""
    let us talk on Monday | I will send details later | please confirm by Friday
    call me if anything is unclear | can you check the last page | no action is needed | please reply by noon
    I will keep you posted | let me know what you think | please bring your notes | we should meet next week
    please forward it to your team | I need your answer today | see the shared folder
    please update the sheet | we can decide tomorrow | thank you for your help | please book a room
""")

FIRST_NAMES = _split("""
    Morgan | Robin | Sasha | Jamie | Rowan | Elliot | Harper | Skyler | Reese | Dana | Kendall | Emery
    Marlow | Finley | Hayden | Lennox | Blair | Noor | Tatum | Ellis | Remy | Shiloh | Arden | Briar | Indigo
""")
LAST_NAMES = _split("""
    Abbott | Lindqvist | Okafor | Bianchi | Novak | Hughes | Castillo | Fischer | Dubois | Yamada | Keller
    Rossi | Andersen | Walsh | Iyer | Moreno | Kowalski | Barros | Stewart | Haddad | Nguyen | Petersen
    Romero | Vance | Whitaker
""")
COMPANIES = _split("""
    brightpath | northwindlabs | silverpine | quantaforge | bluecanyon | helioworks | greenharbor | ironleaf
    skybridge | clearwater | redmaple | openmeadow | novasteel | suncrest | deepfield
""")
NOTES = _split("""
    Wants a demo in January | Asked for a discount | Prefers to be called in the morning
    Met at the trade fair | Waiting for the legal team | Needs a second quote | Interested in a pilot
    Asked for references | Budget approved | Will decide after the holidays | Sent the brochure
    Moved to a new office | Very happy with support | Needs the contract in PDF | Asked about training dates
    Wants to talk to an engineer
""")

METRICS = {
    "total_visits": ["total visits", "the total number of visits"],
    "session_duration_seconds": ["session duration", "session durations"],
    "user_engaged": ["engaged users", "user engagement"],
    "visits_direct": ["direct visits", "visits from direct traffic"],
    "visits_referral": ["referral visits", "visits from referrals"],
    "visits_search_engine": ["search engine visits", "visits from search engines"],
    "visits_social_media": ["social media visits", "visits from social media"],
}
PLOTS = {
    "bar": ["bar chart", "bar plot"],
    "line": ["line chart", "line plot"],
    "scatter": ["scatter plot"],
    "histogram": ["histogram"],
}


def make_task_name(r: Random) -> str:
    return f"{r.choice(TASK_VERBS)} {r.choice(TASK_OBJECTS)}"


def make_body(r: Random) -> str:
    return f"{r.choice(BODY_OPENINGS)}, {r.choice(BODY_ENDINGS)}"


def make_phone(r: Random) -> str:
    return f"{r.randint(201, 989)}-{r.randint(200, 999)}-{r.randint(1000, 9999)}"


def say_date(r: Random, day: str) -> str:
    """Returns an ISO date of 2023 in one of several forms. The requests date from 2023-11-30, so that
    2023-12-01 may be "tomorrow"."""
    d = date.fromisoformat(day)
    suffix = "th" if 11 <= d.day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(d.day % 10, "th")
    forms = [day, f"{d:%B} {d.day}", f"{d:%B} {d.day}{suffix}", f"{d:%b} {d.day}", f"{d.day} {d:%B}"]
    forms += [f"{d:%A}, {d:%B} {d.day}"] + (["tomorrow"] if day == "2023-12-01" else [])
    return r.choice(forms)


def say_time(r: Random, moment: str) -> str:
    """Returns the time of a "YYYY-MM-DD HH:MM:SS" in one of several forms."""
    t = datetime.fromisoformat(moment)
    short = f"{t:%I}".lstrip("0") + (f":{t:%M}" if t.minute else "")
    return r.choice([f"{t:%H:%M}", f"{short}{t:%p}".lower(), f"{short} {t:%p}"])


def say_minutes(r: Random, minutes: str) -> str:
    """Returns a duration in minutes in one of several forms."""
    spoken = {"30": "half an hour", "60": "one hour", "90": "an hour and a half", "120": "two hours"}
    return r.choice([f"{minutes} minutes", f"{minutes} min", spoken.get(minutes, f"{minutes} minutes")])
