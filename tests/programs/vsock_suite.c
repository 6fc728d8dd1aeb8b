/* What Linux's tests of vsock (tools/testing/vsock/vsock_test) are linked with, by the linker's --wrap, so that they run
 * unchanged between a guest and a host that has no AF_VSOCK.
 *
 * Both ends: the two programs agree on each step over TCP, which guests lack. Here it is one more vsock connection.
 * The host's end (-DHOST): a vsock socket is a Unix socket of the bridge at $HEARTH_VSOCK.
 */
#include <errno.h>
#include <linux/vm_sockets.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* Attempts to connect to the other program, which may not listen yet, and microseconds between two. */
#define ATTEMPTS 300
#define PAUSE 100000

static unsigned int control_port;

int __wrap_getaddrinfo(const char *host, const char *port, const struct addrinfo *hints,
		       struct addrinfo **result)
{
	static struct sockaddr_vm address = { .svm_family = AF_VSOCK };
	static struct addrinfo found = {
		.ai_family = AF_VSOCK,
		.ai_socktype = SOCK_STREAM,
		.ai_addr = (struct sockaddr *)&address,
		.ai_addrlen = sizeof(address),
	};

	control_port = strtoul(port, NULL, 10);
	address.svm_port = control_port;
	/* What the suite takes where a server names none. */
	address.svm_cid = strcmp(host, "0.0.0.0") ? strtoul(host, NULL, 10) : VMADDR_CID_ANY;
	*result = &found;
	return 0;
}

void __wrap_freeaddrinfo(struct addrinfo *found)
{
}

/* The suite's limits are made for hardware. */
unsigned int __real_alarm(unsigned int seconds);
unsigned int __wrap_alarm(unsigned int seconds)
{
	return __real_alarm(seconds * PATIENCE);
}

static unsigned int port_of(const struct sockaddr *address)
{
	return ((const struct sockaddr_vm *)address)->svm_port;
}

int __real_connect(int fd, const struct sockaddr *address, socklen_t len);

#ifdef HOST

/* Packets of one device keep their order, whatever connection they belong to; what two Unix sockets carry has none. The
 * suite counts on the order where it sends a line, and where it waits for the end of a connection: what
 * came before gets this long, in microseconds. */
#define SETTLE 50000

static int control = -1, control_listener = -1;

static struct sockaddr_un place(const char *format, unsigned int port)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	snprintf(address.sun_path, sizeof(address.sun_path), format, getenv("HEARTH_VSOCK"), port);
	return address;
}

int __real_socket(int family, int type, int protocol);
int __wrap_socket(int family, int type, int protocol)
{
	return __real_socket(family == AF_VSOCK ? AF_UNIX : family, type, protocol);
}

int __real_bind(int fd, const struct sockaddr *address, socklen_t len);
int __wrap_bind(int fd, const struct sockaddr *address, socklen_t len)
{
	struct sockaddr_un own = place("%s_%u", port_of(address));

	if (port_of(address) == control_port)
		control_listener = fd;
	/* A closed Unix socket leaves its name. */
	unlink(own.sun_path);
	return __real_bind(fd, (struct sockaddr *)&own, sizeof(own));
}

int __real_accept(int fd, struct sockaddr *address, socklen_t *len);
int __wrap_accept(int fd, struct sockaddr *address, socklen_t *len)
{
	/* The bridge does not tell the guest's port. */
	struct sockaddr_vm peer = { .svm_family = AF_VSOCK, .svm_port = VMADDR_PORT_ANY };
	int accepted = __real_accept(fd, NULL, NULL);

	if (accepted >= 0 && fd == control_listener) {
		control = accepted;
		/* Another one gets its number. */
		control_listener = -1;
	}
	if (accepted >= 0 && address) {
		memcpy(address, &peer, sizeof(peer));
		*len = sizeof(peer);
	}
	return accepted;
}

/* The line that the bridge answers, and not a byte more; none if it hangs up. */
static int greeted(int fd, unsigned int port)
{
	char byte = 0;

	if (dprintf(fd, "CONNECT %u\n", port) < 0)
		return 0;
	while (byte != '\n') {
		if (read(fd, &byte, 1) != 1)
			return 0;
	}
	return 1;
}

/* A Unix socket connects once, and is bound already where the suite chose a port, which the host cannot: another one
 * takes its place. */
static int dial(int fd, const struct sockaddr *address, socklen_t len)
{
	struct sockaddr_un bridge = place("%s", 0);
	int other = __real_socket(AF_UNIX, SOCK_STREAM, 0);

	if (__real_connect(other, (struct sockaddr *)&bridge, sizeof(bridge))) {
		perror("connect to the bridge");
		exit(EXIT_FAILURE);
	}
	if (!greeted(other, port_of(address))) {
		close(other);
		errno = ECONNRESET;
		return -1;
	}
	if (port_of(address) == control_port)
		control = fd;
	dup2(other, fd);
	close(other);
	return 0;
}

ssize_t __real_send(int fd, const void *bytes, size_t len, int flags);
ssize_t __wrap_send(int fd, const void *bytes, size_t len, int flags)
{
	if (fd == control && len == 1 && *(const char *)bytes == '\n')
		usleep(SETTLE);
	return __real_send(fd, bytes, len, flags);
}

ssize_t __real_recv(int fd, void *bytes, size_t len, int flags);
ssize_t __wrap_recv(int fd, void *bytes, size_t len, int flags)
{
	ssize_t received = __real_recv(fd, bytes, len, flags);

	if (fd == control && received == 1 && *(const char *)bytes == '\n')
		usleep(SETTLE);
	return received;
}

int __real_epoll_wait(int fd, struct epoll_event *events, int count, int timeout);
int __wrap_epoll_wait(int fd, struct epoll_event *events, int count, int timeout)
{
	int found = __real_epoll_wait(fd, events, count, timeout);

	usleep(SETTLE);
	return found;
}

#else
#define dial __real_connect
#endif

int __wrap_connect(int fd, const struct sockaddr *address, socklen_t len)
{
	int ret = dial(fd, address, len);

	for (int i = 1; ret && port_of(address) == control_port && i < ATTEMPTS; i++) {
		usleep(PAUSE);
		ret = dial(fd, address, len);
	}
	return ret;
}
