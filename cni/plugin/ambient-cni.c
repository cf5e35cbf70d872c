/* The CNI plugin that chains pods into the mesh: it asks the node agent, over a Unix socket, and says what it answers.
 *
 * It runs on the host, once for each pod that starts or ends, and there is nothing beside it: no interpreter, no shared
 * library, no file of its own. So it does not think: what a pod needs is decided and done by the agent. What it does
 * itself is what must work without the agent: an ADD that is not answered is an error by which the kubelet tries again
 * (the pod waits, it never starts outside the mesh), but for namespaces that its configuration exempts, where the
 * agent's own pods start; and a DEL never fails.
 *
 * Rule: nothing that comes in is trusted to be well formed. All text is kept with its length, every look ahead is
 * bounded, and nothing recurses.
 *
 * CNI: https://www.cni.dev/docs/spec/ (1.1), of which results are passed through unchanged.
 */

#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define DEFAULT_SOCKET "/var/run/istio-cni/plugin.sock"
#define SPEC_VERSION "1.0.0"
#define MOST_INPUT (8u << 20)	/* bytes of a configuration, prevResult in it */
#define MOST_ANSWER (8u << 20)
#define DEEPEST 256		/* arrays and objects in one another */
#define COMING 3000		/* ms for which an agent that restarts is waited for */
#define ADD_LIMIT 30000		/* ms for the agent to bring a pod into the mesh */
#define DEL_LIMIT 1000

/* Error codes of the specification. */
enum { BAD_ENVIRONMENT = 4, IO_FAILURE = 5, UNDECODABLE = 6, INVALID_CONFIG = 7, TRY_LATER = 11 };

struct text {
	const char *data;
	size_t length;
};

static const char *const supported = "[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]";

/* --- JSON: finding things in it; a value is kept as the text that it is ----------------------------------------- */

static size_t blank(struct text json, size_t at)
{
	while (at < json.length && (json.data[at] == ' ' || json.data[at] == '\t' || json.data[at] == '\n' ||
				    json.data[at] == '\r'))
		at++;
	return at;
}

/* The place after the string that begins at `at`, 0 if none does, or it does not end. */
static size_t after_string(struct text json, size_t at)
{
	if (at >= json.length || json.data[at] != '"')
		return 0;
	for (at++; at < json.length; at++) {
		if (json.data[at] == '\\')
			at++;
		else if (json.data[at] == '"')
			return at + 1;
	}
	return 0;
}

/* The place after the value that begins at `at`, 0 if none does, or it does not end. Brackets must match; what is
 * between them is not looked at any closer: it is read by whoever needs it. */
static size_t after_value(struct text json, size_t at)
{
	char open[DEEPEST];
	size_t depth = 0, from;

	do {
		at = blank(json, at);
		if (at >= json.length)
			return 0;
		switch (json.data[at]) {
		case '"':
			at = after_string(json, at);
			if (!at)
				return 0;
			break;
		case '{':
		case '[':
			if (depth == DEEPEST)
				return 0;
			open[depth++] = json.data[at++] == '{' ? '}' : ']';
			continue;
		case '}':
		case ']':
			if (!depth || open[depth - 1] != json.data[at])
				return 0;
			depth--;
			at++;
			break;
		case ',':
		case ':':
			if (!depth)
				return 0;
			at++;
			continue;
		default:
			from = at;
			while (at < json.length && !strchr(" \t\r\n,:{}[]\"", json.data[at]))
				at++;
			if (at == from)	/* a NUL, which strchr finds in every string */
				return 0;
		}
	} while (depth);
	return at;
}

/* The value of a member of the object that `json` is, the last of that name, empty if there is none.
 * 0 if all is well, -1 where `json` is no object. */
static int member(struct text json, const char *name, struct text *found)
{
	size_t at = blank(json, 0), key, value, end, length = strlen(name);

	found->data = NULL;
	found->length = 0;
	if (at >= json.length || json.data[at] != '{')
		return -1;
	at = blank(json, at + 1);
	if (at < json.length && json.data[at] == '}')
		return blank(json, at + 1) == json.length ? 0 : -1;
	for (;;) {
		key = at;
		at = after_string(json, at);
		if (!at)
			return -1;
		end = at - 1;
		at = blank(json, at);
		if (at >= json.length || json.data[at] != ':')
			return -1;
		value = blank(json, at + 1);
		at = after_value(json, value);
		if (!at)
			return -1;
		if (end - key - 1 == length && !memcmp(json.data + key + 1, name, length)) {
			found->data = json.data + value;
			found->length = at - value;
		}
		at = blank(json, at);
		if (at >= json.length)
			return -1;
		if (json.data[at] == '}')
			return blank(json, at + 1) == json.length ? 0 : -1;
		if (json.data[at] != ',')
			return -1;
		at = blank(json, at + 1);
	}
}

/* Whether `array` is an array with the string `wanted` in it, neither with escapes. */
static int has_string(struct text array, struct text wanted)
{
	size_t at, from;

	if (!array.length || array.data[0] != '[')
		return 0;
	at = blank(array, 1);
	while (at < array.length && array.data[at] != ']') {
		from = at;
		at = after_value(array, at);
		if (!at)
			return 0;
		if (array.data[from] == '"' && at - from == wanted.length + 2 &&
		    !memcmp(array.data + from + 1, wanted.data, wanted.length))
			return 1;
		at = blank(array, at);
		if (at < array.length && array.data[at] == ',')
			at = blank(array, at + 1);
	}
	return 0;
}

/* The inside of a string without escapes, or what `otherwise` says. */
static struct text plain(struct text value, const char *otherwise)
{
	struct text inside = { otherwise, strlen(otherwise) };

	if (value.length >= 2 && value.data[0] == '"' && !memchr(value.data, '\\', value.length)) {
		inside.data = value.data + 1;
		inside.length = value.length - 2;
	}
	return inside;
}

/* --- what the runtime is told ------------------------------------------------------------------------------------ */

static void put_escaped(struct text text)
{
	size_t at;

	for (at = 0; at < text.length; at++) {
		unsigned char byte = (unsigned char)text.data[at];

		if (byte == '"' || byte == '\\')
			printf("\\%c", byte);
		else if (byte < 0x20 || byte >= 0x7f)
			printf("\\u%04x", byte);
		else
			putchar(byte);
	}
}

static int finish(int status)
{
	if (fflush(stdout) || ferror(stdout))
		return 1;
	return status;
}

/* An error as the specification has it; `pod` may be empty. */
static int fail(struct text version, int code, struct text pod, const char *message, const char *remedy)
{
	fputs("{\"cniVersion\":\"", stdout);
	put_escaped(version);
	printf("\",\"code\":%d,\"msg\":\"ambient-cni: ", code);
	if (pod.length) {
		fputs("pod ", stdout);
		put_escaped(pod);
		fputs(" ", stdout);
	}
	put_escaped((struct text){ message, strlen(message) });
	fputs("\",\"details\":\"", stdout);
	put_escaped((struct text){ remedy, strlen(remedy) });
	puts("\"}");
	return finish(1);
}

/* --- the environment --------------------------------------------------------------------------------------------- */

static const char *const passed[] = {
	"CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH",
};

/* A value of CNI_ARGS (KEY=VALUE;KEY=VALUE), empty if it is not there. */
static struct text argument(const char *name)
{
	const char *at = getenv("CNI_ARGS");
	size_t length = strlen(name);
	struct text value = { "", 0 };

	while (at && *at) {
		const char *end = strchr(at, ';');
		size_t size = end ? (size_t)(end - at) : strlen(at);

		if (size > length && at[length] == '=' && !memcmp(at, name, length)) {
			value.data = at + length + 1;
			value.length = size - length - 1;
			return value;
		}
		at = end ? end + 1 : NULL;
	}
	return value;
}

/* --- the agent ---------------------------------------------------------------------------------------------------- */

static int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (int64_t)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

/* A connection to the agent, or -1 and errno. One that is about to come is waited for until `until`. */
static int reach(struct text path, int64_t until)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct timespec pause = { 0, 20 * 1000 * 1000 };
	int descriptor, reason;

	if (!path.length || path.length >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	memcpy(address.sun_path, path.data, path.length);
	for (;;) {
		descriptor = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		if (descriptor < 0)
			return -1;
		if (!connect(descriptor, (struct sockaddr *)&address, sizeof(address)))
			return descriptor;
		reason = errno;
		close(descriptor);
		errno = reason;
		if ((reason != ENOENT && reason != ECONNREFUSED && reason != EAGAIN) || now() >= until)
			return -1;
		nanosleep(&pause, NULL);
	}
}

/* Until the descriptor is ready for `what`: 0, or -1 when the time is over. */
static int wait_for(int descriptor, short what, int64_t until)
{
	struct pollfd entry = { .fd = descriptor, .events = what };
	int64_t left;
	int ready;

	do {
		left = until - now();
		if (left <= 0) {
			errno = ETIMEDOUT;
			return -1;
		}
		ready = poll(&entry, 1, (int)left);
	} while (ready < 0 && errno == EINTR);
	if (ready == 0)
		errno = ETIMEDOUT;
	return ready > 0 ? 0 : -1;
}

static int send_all(int descriptor, struct text part, int64_t until)
{
	ssize_t sent;

	while (part.length) {
		sent = send(descriptor, part.data, part.length, MSG_NOSIGNAL);
		if (sent < 0 && (errno == EAGAIN || errno == EINTR)) {
			if (wait_for(descriptor, POLLOUT, until))
				return -1;
			continue;
		}
		if (sent < 0)
			return -1;
		part.data += sent;
		part.length -= (size_t)sent;
	}
	return 0;
}

static int receive_all(int descriptor, char *into, size_t length, int64_t until)
{
	ssize_t got;

	while (length) {
		got = recv(descriptor, into, length, 0);
		if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
			if (wait_for(descriptor, POLLIN, until))
				return -1;
			continue;
		}
		if (got <= 0) {
			if (!got)
				errno = ECONNRESET;
			return -1;
		}
		into += got;
		length -= (size_t)got;
	}
	return 0;
}

static uint32_t number(const unsigned char *bytes)
{
	return (uint32_t)bytes[0] << 24 | (uint32_t)bytes[1] << 16 | (uint32_t)bytes[2] << 8 | bytes[3];
}

/* Ask the agent: its status (0: done) and what to print, which may be empty. -1 and errno where it does not answer.
 *
 * The question: its length (4 bytes, most significant first), then NAME=VALUE of the environment, each ended by a zero
 * byte, another zero byte, and the configuration. The answer: status and length, 4 bytes each, then what to print. */
static int ask(int descriptor, struct text config, int64_t until, char **answer, size_t *length)
{
	unsigned char head[8];
	struct text part;
	size_t index, total = 1 + config.length;

	for (index = 0; index < sizeof(passed) / sizeof(*passed); index++)
		if (getenv(passed[index]))
			total += strlen(passed[index]) + 1 + strlen(getenv(passed[index])) + 1;
	head[0] = (unsigned char)(total >> 24);
	head[1] = (unsigned char)(total >> 16);
	head[2] = (unsigned char)(total >> 8);
	head[3] = (unsigned char)total;
	if (send_all(descriptor, (struct text){ (char *)head, 4 }, until))
		return -1;
	for (index = 0; index < sizeof(passed) / sizeof(*passed); index++) {
		const char *value = getenv(passed[index]);

		if (!value)
			continue;
		part = (struct text){ passed[index], strlen(passed[index]) };
		if (send_all(descriptor, part, until) || send_all(descriptor, (struct text){ "=", 1 }, until) ||
		    send_all(descriptor, (struct text){ value, strlen(value) + 1 }, until))
			return -1;
	}
	if (send_all(descriptor, (struct text){ "", 1 }, until) || send_all(descriptor, config, until))
		return -1;
	if (receive_all(descriptor, (char *)head, 8, until))
		return -1;
	*length = number(head + 4);
	if (*length > MOST_ANSWER || number(head) > 1) {
		errno = EPROTO;
		return -1;
	}
	*answer = malloc(*length + 1);
	if (!*answer || receive_all(descriptor, *answer, *length, until))
		return -1;
	return (int)number(head);
}

/* --- commands ----------------------------------------------------------------------------------------------------- */

static int read_config(struct text *config)
{
	size_t room = 16384, length = 0;
	char *data = malloc(room);
	ssize_t got;

	if (!data)
		return -1;
	for (;;) {
		got = read(STDIN_FILENO, data + length, room - length);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -1;
		if (!got)
			break;
		length += (size_t)got;
		if (length == room) {
			char *more;

			if (room >= MOST_INPUT) {
				errno = EFBIG;
				return -1;
			}
			room *= 2;
			more = realloc(data, room);
			if (!more)
				return -1;
			data = more;
		}
	}
	config->data = data;
	config->length = length;
	return 0;
}

static int pass(struct text version, struct text previous)
{
	if (!previous.length || previous.data[0] != '{')
		return fail(version, INVALID_CONFIG, (struct text){ "", 0 }, "there is no prevResult",
			    "chain ambient-cni after the network's own plugin, as the last entry of a .conflist");
	fwrite(previous.data, 1, previous.length, stdout);
	putchar('\n');
	return finish(0);
}

static int add(struct text config, struct text version, struct text path)
{
	static const char remedy[] = "the kubelet tries again; if this lasts look at the istio-cni-node pod of this node: "
				     "kubectl -n istio-system get pods -l k8s-app=istio-cni-node -o wide";
	struct text previous, exempt, namespace = argument("K8S_POD_NAMESPACE"), name = argument("K8S_POD_NAME"), pod;
	char message[256], called[600], *answer = NULL;
	size_t length = 0;
	int64_t start = now();
	int descriptor, status;

	if (member(config, "prevResult", &previous) || member(config, "exempt_namespaces", &exempt))
		return fail(version, UNDECODABLE, (struct text){ "", 0 }, "the configuration is no JSON object", "");
	if (!namespace.length || !name.length || has_string(exempt, namespace))
		return pass(version, previous);
	snprintf(called, sizeof(called), "%.*s/%.*s", (int)(namespace.length > 253 ? 253 : namespace.length),
		 namespace.data, (int)(name.length > 253 ? 253 : name.length), name.data);
	pod = (struct text){ called, strlen(called) };
	descriptor = reach(path, start + COMING);
	if (descriptor < 0) {
		snprintf(message, sizeof(message), "waits for the mesh: the node agent is not there (%s)",
			 strerror(errno));
		return fail(version, TRY_LATER, pod, message, remedy);
	}
	status = ask(descriptor, config, start + ADD_LIMIT, &answer, &length);
	if (status < 0) {
		snprintf(message, sizeof(message), "waits for the mesh: the node agent does not answer (%s)",
			 strerror(errno));
		return fail(version, TRY_LATER, pod, message, remedy);
	}
	if (!status && !length)
		return pass(version, previous);
	fwrite(answer, 1, length, stdout);
	return finish(status);
}

/* The agent is told, so that ztunnel lets the namespace go at once; it finds out by itself if it is away. */
static int del(struct text config, struct text path)
{
	int64_t until = now() + DEL_LIMIT;
	int descriptor = reach(path, 0);
	char *answer = NULL;
	size_t length;

	if (descriptor >= 0)
		(void)ask(descriptor, config, until, &answer, &length);
	return 0;
}

static int version_told(struct text version)
{
	fputs("{\"cniVersion\":\"", stdout);
	put_escaped(version);
	printf("\",\"supportedVersions\":%s}\n", supported);
	return finish(0);
}

int main(void)
{
	const char *command = getenv("CNI_COMMAND");
	struct text config = { "", 0 }, value, version, path;

	if (!command) {
		fputs("ambient-cni: the ambient mesh's CNI plugin; container runtimes call it (CNI_COMMAND is not set)\n",
		      stderr);
		return fail((struct text){ SPEC_VERSION, 5 }, BAD_ENVIRONMENT, config, "CNI_COMMAND is not set",
			    "container runtimes call this program");
	}
	if (read_config(&config)) {
		if (!strcmp(command, "DEL") || !strcmp(command, "GC"))
			return 0;
		return fail((struct text){ SPEC_VERSION, 5 }, IO_FAILURE, (struct text){ "", 0 },
			    "cannot read the configuration", strerror(errno));
	}
	if (member(config, "cniVersion", &value)) {
		if (!strcmp(command, "DEL") || !strcmp(command, "GC"))
			return 0;
		if (!strcmp(command, "VERSION"))
			return version_told((struct text){ SPEC_VERSION, 5 });
		return fail((struct text){ SPEC_VERSION, 5 }, UNDECODABLE, (struct text){ "", 0 },
			    "the configuration is no JSON object", "correct the entry ambient-cni of the .conflist");
	}
	version = plain(value, SPEC_VERSION);
	(void)member(config, "socket", &value);
	path = plain(value, DEFAULT_SOCKET);
	if (!strcmp(command, "ADD"))
		return add(config, version, path);
	if (!strcmp(command, "DEL"))
		return del(config, path);
	if (!strcmp(command, "VERSION"))
		return version_told(version);
	if (!strcmp(command, "CHECK") || !strcmp(command, "GC") || !strcmp(command, "STATUS"))
		return 0;
	return fail(version, BAD_ENVIRONMENT, (struct text){ "", 0 }, "CNI_COMMAND is not known",
		    "use ADD, DEL, CHECK, GC, STATUS or VERSION");
}
